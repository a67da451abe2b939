"""What lastgood's promises rest on, one step at a time, each with the edit that takes that step out of the source."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """In ``file`` of the package, ``old`` becomes ``new``. ``tests`` are those that have to notice, in this order."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


_POWER = "tests/crash/power_cuts"
_LOCAL = (
    "tests/storage/test_durable_write.py",
    "tests/storage/test_local.py",
    "tests/storage/test_directories.py",
    "tests/storage/test_names.py",
)
_WRITE = "storage/_durable_write.py"
_DAMAGE = ("tests/unit/loading/test_corruption.py", "tests/unit/loading/test_whole_verification.py")
_VOTES = ("tests/unit/coordination/test_votes.py", "tests/unit/sharding/test_votes.py")
_MANIFEST = ("tests/unit/test_manifest.py", "tests/unit/contents/test_manifest_check.py", *_VOTES)
_BARRIER = (
    "tests/unit/test_checkpoint_writer.py",
    "tests/unit/test_manifest.py",
    "tests/distributed/test_saves_processes.py",
)
_REMOVAL = ("tests/manager/test_removal.py", "tests/manager/test_deaths.py", _POWER)

FSYNCS = (
    Mutation(
        "fsync of a file before it gets its name",
        _WRITE,
        "                self._ops.fsync(self._descriptor)\n",
        "                pass\n",
        (*_LOCAL, _POWER),
    ),
    Mutation(
        "fsync at the operating system",
        "storage/file_ops.py",
        "    def fsync(self, descriptor: int) -> None:\n        os.fsync(descriptor)\n",
        "    def fsync(self, descriptor: int) -> None:\n        pass\n",
        ("tests/storage",),
    ),
    Mutation(
        "fsync of a directory at the operating system",
        "storage/file_ops.py",
        "        try:\n            os.fsync(descriptor)\n        finally:\n            with",
        "        try:\n            pass\n        finally:\n            with",
        ("tests/storage",),
    ),
    Mutation(
        "directory fsync after a file got its name",
        _WRITE,
        "                sync_directory(self._ops, os.path.dirname(self._path))\n",
        "                pass\n",
        (*_LOCAL, _POWER),
    ),
    Mutation(
        "directory fsync after a directory was made",
        _WRITE,
        "        sync_directory(ops, os.path.dirname(directory))\n",
        "        pass\n",
        (*_LOCAL, _POWER),
    ),
    Mutation(
        "directory fsync for a directory whose maker may have been killed",
        _WRITE,
        "            sync_directory(ops, parent)\n",
        "            pass\n",
        (*_LOCAL, _POWER),
    ),
    Mutation(
        "directory fsync after a file was deleted",
        "storage/local.py",
        "                sync_directory(self._ops, os.path.dirname(absolute))\n",
        "                pass\n",
        (*_LOCAL, _POWER),
    ),
    Mutation(
        "directory fsync after a directory was renamed",
        "storage/local.py",
        "            sync_directory(self._ops, os.path.dirname(target))\n",
        "            pass\n",
        (*_LOCAL, _POWER),
    ),
    Mutation(
        "directory fsync after a directory was removed",
        "storage/_directories.py",
        "    sync_directory(ops, os.path.dirname(directory))\n    return True\n",
        "    return True\n",
        (*_LOCAL, _POWER),
    ),
    Mutation(
        "directory fsync for a checkpoint that retention counts, whose maker may have been killed",
        "manager/removal.py",
        "            storage.settle(directory)\n",
        "            pass\n",
        (_POWER,),
    ),
    Mutation(
        "directory fsync for a manifest that is seen before rank 0 has made it certain",
        "format/commit.py",
        "    storage.settle(path)\n",
        "    pass\n",
        (_POWER,),
    ),
    Mutation(
        "directory fsync for a manifest whose rank 0 is gone, before its save is called durable",
        "_coordination/together.py",
        "            self._storage.settle(self._path)\n",
        "            pass\n",
        (*_VOTES, _POWER),
    ),
    Mutation(
        "directory fsync for the checkpoint that a run goes on from",
        "manager/restoring.py",
        "                self._storage.settle(directory)\n",
        "                pass\n",
        (_POWER,),
    ),
    Mutation(
        "no second fsync after one that failed",
        _WRITE,
        '            self._state = "ended"  # until fsync has said otherwise',
        '            self._state = "writing"  # until fsync has said otherwise',
        _LOCAL,
    ),
)

CHECKSUMS = (
    Mutation(
        "CRC of a block that is loaded",
        "_loading/records.py",
        "        if crc32(data[start : start + BLOCK_SIZE]) != archive.block_crcs[number]:\n",
        "        if False:\n",
        _DAMAGE,
    ),
    Mutation(
        "CRC of a record that is loaded whole",
        "_loading/records.py",
        "        if crc32(data) != archive.record_crcs[number]:\n",
        "        if False:\n",
        _DAMAGE,
    ),
    Mutation(
        "bytes between the records, in a whole load",
        "_loading/records.py",
        '    if b"".join(expected) != scratch:\n',
        "    if False:\n",
        _DAMAGE,
    ),
    Mutation(
        "the pickle says what the index says",
        "_loading/records.py",
        "    if expected != pickle_bytes:\n",
        "    if False:\n",
        (*_DAMAGE, "tests/unit/loading/test_hostile_ours.py"),
    ),
    Mutation(
        "CRC of the index",
        "format/ending.py",
        "        if crc32(index_bytes) != self.trailer.index_crc:\n",
        "        if False:\n",
        ("tests/unit/format", *_DAMAGE, "tests/hostile"),
    ),
    Mutation(
        "CRC of the table of block CRCs",
        "format/ending.py",
        "        if crc32(blocks_bytes) != self.trailer.blocks_crc:\n",
        "        if False:\n",
        ("tests/unit/format", *_DAMAGE, "tests/hostile"),
    ),
    Mutation(
        "CRC of the manifest",
        "format/manifest.py",
        "        if crc32(bytes(sealed.manifest)) != sealed.crc32:\n",
        "        if False:\n",
        (*_MANIFEST, "tests/hostile"),
    ),
    Mutation(
        "CRC of the epoch's record",
        "format/epoch.py",
        "        if crc32(bytes(sealed.epoch)) != sealed.crc32:\n",
        "        if False:\n",
        ("tests/unit/coordination/test_epoch.py",),
    ),
    Mutation(
        "CRC of a block, in verify",
        "_contents/checking.py",
        "            if crc32(data[at : at + BLOCK_SIZE]) != archive.block_crcs[first + block]:\n",
        "            if False:\n",
        ("tests/unit/contents", "tests/cli/test_verify.py"),
    ),
    Mutation(
        "bytes between the records, in verify",
        "_contents/checking.py",
        "        if buffer[start:end] != expected:\n",
        "        if False:\n",
        ("tests/unit/contents", "tests/cli/test_verify.py"),
    ),
    Mutation(
        "the trailer is as it would be written",
        "format/archive.py",
        "    if ending.trailer_bytes != pack_trailer(layout, trailer.index_crc, trailer.blocks_crc, index.save_id):\n",
        "    if False:\n",
        ("tests/unit/format", *_DAMAGE, "tests/hostile"),
    ),
    Mutation(
        "CRC of a record of torch.save",
        "_loading/zip_records.py",
        " if crc != record.crc]\n",
        " if False]\n",
        ("tests/unit/loading/test_foreign.py", "tests/unit/contents", "tests/hostile"),
    ),
    Mutation(
        "CRC of a small tensor that is shown or compared",
        "cli/_tensors.py",
        "                is_good = crc is None or crc32(scratch[start - begin : end - begin]) == crc\n",
        "                is_good = True\n",
        ("tests/cli/test_diff.py", "tests/cli/test_cat.py"),
    ),
    Mutation(
        "CRC of a record of torch.save that is shown or compared",
        "cli/_tensors.py",
        "        if found != place.crc:\n",
        "        if False:\n",
        ("tests/cli/test_cat.py", "tests/cli/test_diff.py"),
    ),
    Mutation(
        "checksums of what is declared to be the same on all ranks",
        "format/vote.py",
        "    _compare_replicas(decoded, fetch)\n",
        "    pass\n",
        (*_VOTES, "tests/distributed/test_sharded_tensors.py"),
    ),
)

IDS = (
    Mutation(
        "save id of index and trailer",
        "format/archive.py",
        "    if trailer.save_id != index.save_id:\n",
        "    if False:\n",
        ("tests/unit/format", "tests/unit/loading", "tests/hostile"),
    ),
    Mutation(
        "save id of the file that a rank votes for",
        "format/vote.py",
        "    if index.save_id != save_id or index.independent:\n",
        "    if False:\n",
        _VOTES,
    ),
    Mutation(
        "rank and save id of each vote",
        "format/vote.py",
        "        if (vote.rank, vote.world_size, vote.save_id) != (rank, len(votes), expected):\n",
        "        if False:\n",
        (*_VOTES, "tests/unit/test_manifest.py", "tests/unit/test_checkpoint_writer.py"),
    ),
    Mutation(
        "save id of the file that rank 0 has written, at the barrier's commit",
        "format/commit.py",
        "    if manifest.save_id != save_id:\n",
        "    if False:\n",
        _BARRIER,
    ),
    Mutation(
        "save id of this rank's file in the manifest that it waited for",
        "format/commit.py",
        "    if rank >= manifest.world_size or manifest.files[rank].save_id != save_id:\n",
        "    if False:\n",
        _BARRIER,
    ),
    Mutation(
        "a file is the one that the manifest names",
        "format/commit.py",
        "    return (entry.save_id, entry.size, entry.trailer_crc) == (\n",
        "    return True or (entry.save_id, entry.size, entry.trailer_crc) == (\n",
        ("tests/unit/loading/test_reader.py", *_MANIFEST),
    ),
    Mutation(
        "the file of rank 0 is the one that the manifest names, in the catalog of a run",
        "manager/catalog.py",
        "        if (named.save_id, named.size, named.trailer_crc) != ",
        "        if False and () != ",
        ("tests/unit/manager/test_catalog.py",),
    ),
    Mutation(
        "save ids of the files that a manifest names, in verify",
        "_contents/manifest_check.py",
        "        if (manifest.tensors and others) or manifest.files[0].save_id != manifest.save_id:\n",
        "        if False:\n",
        ("tests/unit/contents/test_manifest_check.py",),
    ),
    Mutation(
        "save id of the manifest that is there when rank 0 is gone",
        "_coordination/together.py",
        "        return manifest is not None and manifest.save_id == self.save_id\n",
        "        return manifest is not None\n",
        (*_VOTES, "tests/distributed/test_votes_processes.py"),
    ),
    Mutation(
        "the epoch is that of this job",
        "format/epoch.py",
        "    if found is not None and found.job != mine.job:\n",
        "    if False:\n",
        ("tests/unit/coordination/test_epoch.py",),
    ),
    Mutation(
        "what is removed is what was judged",
        "manager/removal.py",
        "        if not _is_the_same(storage, entry):\n",
        "        if False:\n",
        _REMOVAL,
    ),
    Mutation(
        "a step that is set aside is the one that was found damaged",
        "manager/resume.py",
        "    return set_aside(storage, root, passed.step) if is_the_same else None\n",
        "    return set_aside(storage, root, passed.step)\n",
        ("tests/manager/test_resume.py",),
    ),
)

ORDER = (
    Mutation(
        "bytes are durable before the name is there",
        _WRITE,
        "        self.make_durable()\n        with self._descriptors.in_use():\n",
        "        with self._descriptors.in_use():\n",
        (*_LOCAL, _POWER),
    ),
    Mutation(
        "bytes are durable before the hook and the other ranks are told",
        "_image_writer.py",
        "            upload.make_durable()\n",
        "            pass\n",
        ("tests/unit/test_checkpoint_writer.py", "tests/storage", _POWER),
    ),
    Mutation(
        "all ranks have come before the commit",
        "checkpoint_writer.py",
        "                    self._wait_for_others(directory)\n",
        "                    pass\n",
        ("tests/unit/test_checkpoint_writer.py",),
    ),
    Mutation(
        "all ranks have voted before the manifest",
        "_coordination/together.py",
        "            self._wait_for_all()\n",
        "            pass\n",
        _VOTES,
    ),
    Mutation(
        "a record's bytes are durable before other jobs are shut out, and before it could come back",
        "format/epoch.py",
        "        write.make_durable()\n",
        "        pass\n",
        ("tests/unit/coordination/test_epoch.py", *_VOTES),
    ),
    Mutation(
        "no other job has taken over while the manifest is published",
        "_coordination/together.py",
        "        no_other_job = publishing(self._storage, self._root, self._epoch, self._timeout_secs)\n",
        "        no_other_job = contextlib.nullcontext()\n",
        _VOTES,
    ),
    Mutation(
        "no other job has taken over while a rank's file is published",
        "_coordination/together.py",
        "        with publishing(self._storage, self._root, epoch, self._timeout_secs):\n            yield\n",
        "        yield\n",
        (*_VOTES, "tests/distributed/test_votes_processes.py"),
    ),
    Mutation(
        "whoever publishes looks at the epoch under the lock",
        "format/epoch.py",
        "        check_epoch(storage, root, mine)\n        yield\n",
        "        yield\n",
        ("tests/unit/coordination/test_epoch.py",),
    ),
    Mutation(
        "the commit record goes before the files that it names",
        "manager/removal.py",
        "            storage.delete(os.path.join(entry.path, MANIFEST_NAME))\n        for rank in ranks:\n"
        "            storage.delete(checkpoint_file(entry.path, rank))\n",
        "            pass\n        for rank in ranks:\n            storage.delete(checkpoint_file(entry.path, rank))\n"
        "        if MANIFEST_NAME in names:\n            storage.delete(os.path.join(entry.path, MANIFEST_NAME))\n",
        _REMOVAL,
    ),
    Mutation(
        "the newest that stays is found good before anything is removed",
        "manager/removal.py",
        "        check(storage, decision.keep[-1].entry)\n",
        "        pass\n",
        ("tests/manager/test_resume.py", *_REMOVAL),
    ),
    Mutation(
        "the newest checkpoint stays, whatever the rules say",
        "manager/retention.py",
        '{newest: "the newest"}, ',
        "",
        ("tests/unit/manager/test_retention.py",),
    ),
    Mutation(
        "nothing is removed where somebody is writing",
        "manager/removal.py",
        "    if storage.has_writers(entry.path):",
        "    if False:",
        _REMOVAL,
    ),
    Mutation(
        "a snapshot is known to be of one moment before it is published",
        "_staged_image.py",
        "            while not self._is_complete:\n                self._wait_for_change(timeout_secs)\n",
        "            pass\n",
        ("tests/async/test_staged_image.py", "tests/async/test_consistency.py"),
    ),
    Mutation(
        "a tensor that changed between the call and its copy ends the save",
        "_staging/witnesses.py",
        "        if changed:\n",
        "        if False:\n",
        ("tests/async/test_witnesses.py", "tests/async/test_consistency.py"),
    ),
    Mutation(
        "a committed checkpoint is looked for again under the lock",
        "checkpoint_writer.py",
        "            self.refuse_committed(directory)  # by whoever had the lock until now\n",
        "            pass\n",
        (*_VOTES, "tests/unit/test_checkpoint_writer.py"),
    ),
)

EXCLUSIVE = (
    Mutation(
        "exclusive create of temporaries and locks",
        "storage/file_ops.py",
        "os.O_RDWR | os.O_CREAT | os.O_EXCL | _CLOSE_ON_EXEC",
        "os.O_RDWR | os.O_CREAT | _CLOSE_ON_EXEC",
        ("tests/storage",),
    ),
    Mutation(
        "a link never replaces",
        _WRITE,
        "        ops.link(temporary, path)\n",
        "        ops.replace(temporary, path)\n        return\n",
        _LOCAL,
    ),
    Mutation(
        "a rename that never replaces, where there are no links",
        _WRITE,
        "        ops.rename_without_replacing(temporary, path)\n",
        "        ops.replace(temporary, path)\n",
        _LOCAL,
    ),
    Mutation(
        "the flag of a rename that never replaces",
        "storage/file_ops.py",
        "_RENAME_NOREPLACE = 1\n",
        "_RENAME_NOREPLACE = 0\n",
        ("tests/storage",),
    ),
    Mutation(
        "a manifest never replaces another, by votes",
        "_coordination/together.py",
        "no_other_job, replace=False)\n",
        "no_other_job, replace=True)\n",
        _VOTES,
    ),
    Mutation(
        "a manifest never replaces another, at a barrier",
        "format/commit.py",
        "    storage.put_if_absent(manifest_file(path), encode_manifest(manifest))\n",
        "    storage.put(manifest_file(path), encode_manifest(manifest))\n",
        _BARRIER,
    ),
    Mutation(
        "what several ranks have committed is not written over",
        "checkpoint_writer.py",
        "        self.refuse_committed(directory)\n        write_file = prepare()",
        "        write_file = prepare()",
        ("tests/unit/test_checkpoint_writer.py",),
    ),
    Mutation(
        "a temporary is cleared only if its writer is dead",
        _WRITE,
        "        if ops.lock(descriptor):\n            ops.unlink(temporary)\n",
        "        if True:\n            ops.unlink(temporary)\n",
        ("tests/storage",),
    ),
    Mutation(
        "a lock is one only while its file has its name",
        "storage/_file_lock.py",
        "            if _is_named(ops, name, descriptor):\n                return FileLock",
        "            if True:\n                return FileLock",
        ("tests/storage/test_file_lock.py",),
    ),
)

MUTATIONS: dict[str, tuple[Mutation, ...]] = {
    "fsyncs": FSYNCS,
    "checksums": CHECKSUMS,
    "ids": IDS,
    "order": ORDER,
    "exclusive": EXCLUSIVE,
}
