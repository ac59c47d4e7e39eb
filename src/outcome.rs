//! How operations end and what they report. Below every room, so that each can refuse by name.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How an operation ended. There is no other outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A checkpoint was taken; the tree runs on.
    Checkpointed,
    /// The tree is back at the checkpoint and runs.
    RolledBack,
    /// A container was made of a checkpoint and runs.
    Restored,
    /// Nothing was touched; [`Report::refused`] says why.
    Refused,
    /// A rollback failed after changes began: every process of the tree was killed.
    Lost,
}

/// Why an operation was refused: what stands in the way, who holds it, what the user can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{object} of {holder}: {remedy}")]
pub struct Refusal {
    /// The object, as `fd 7: io_uring ring`.
    pub object: String,
    /// Its holder, as `pid 12 (redis-server)`.
    pub holder: String,
    /// What is wrong and what to do about it.
    pub remedy: String,
}

/// Something that is not as the checkpoint has it, found by the comparison after a rollback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{what}: expected {expected}, found {found}")]
pub struct Difference {
    /// What differs, and whose it is, as `pid 12 (redis-server) thread 14: signal mask`.
    pub what: String,
    /// Its value in the checkpoint.
    pub expected: String,
    /// Its value now.
    pub found: String,
}

/// What an operation did with files.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Files {
    /// Mount points whose files are in the checkpoint.
    pub included: Vec<String>,
    /// Those whose files are not.
    pub left_out: Vec<LeftOut>,
    /// Files in the checkpoint; of a rollback, names and files that were changed back.
    pub files: u64,
    /// Bytes of content in the checkpoint, which it may share with others; of a rollback, bytes that were written.
    pub bytes: u64,
}

/// A mount whose files are not in the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Where it is mounted.
    pub mount_point: String,
    /// Why.
    pub why: String,
}

/// What one operation did and what it took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// The stop window in microseconds: from the first task stopped until all ran again. Of the first checkpoint of a tree,
    /// which stops it twice, the sum of both.
    pub stop_us: u64,
    /// The whole operation in microseconds.
    pub total_us: u64,
    /// Microseconds by phase name.
    pub phases: BTreeMap<String, u64>,
    /// Processes in the checkpoint.
    pub processes: usize,
    /// Threads in the checkpoint.
    pub threads: usize,
    /// Pages that had to be put back (or, of a checkpoint, armed).
    pub dirty_pages: u64,
    /// Bytes copied into the tree.
    pub copied_bytes: u64,
    /// Bytes of headers in the context.
    pub header_bytes: u64,
    /// Processes and threads born since the checkpoint that were killed.
    pub killed: usize,
    /// Processes made again that had ended since the checkpoint, or changed what can't be undone, and threads made again
    /// that had ended.
    pub revived: usize,
    /// Connections that could not be kept and were reset.
    pub reset_connections: usize,
    /// What was done with files.
    #[serde(default)]
    pub files: Files,
    /// Set when `outcome` is [`Outcome::Refused`].
    pub refused: Option<Refusal>,
}
