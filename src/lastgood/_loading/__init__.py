"""Loading one file: records into memory, values from the index, partial loads, files that are not ours."""
