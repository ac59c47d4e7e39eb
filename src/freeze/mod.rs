//! Find and stop a process tree, hold it, run batches in it, let it go.
