//! The keeper: one process per container that holds its checkpoints and answers requests.
