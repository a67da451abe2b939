"""From DTensors to the parts that this rank writes, and back to the parts that it wants."""
