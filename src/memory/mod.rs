//! Address spaces: VMA lists, shadows, dirty tracking, page store, shared memory.
