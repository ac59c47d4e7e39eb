//! The library's face: attach to a process tree, take checkpoints of it, roll it back.
