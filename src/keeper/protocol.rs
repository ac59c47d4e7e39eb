//! What client and keeper say to each other: one JSON object per line over a unix stream socket.
//!
//! A client opens with [`Hello`] and may send its first [`Request`] with it, so that a request costs one round
//! trip. The keeper answers the first request with its own [`Hello`] as soon as it has taken the request on, and
//! every request with one [`Response`], in order. A connection that ends before the keeper's hello was never
//! heard: the request was not carried out and may be tried anew.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::engine::Stream;
use crate::filesystem::ChangeKind;
use crate::image::{Durability, Encoding, Inspection, Summary};
use crate::outcome::{Refusal, Report};

/// The version of this protocol. Both sides name theirs in [`Hello`]; they must be equal.
pub const VERSION: u32 = 1;

/// The longest line either side accepts, in bytes: the changes of a million files have to fit.
pub const LINE_LIMIT: u64 = 256 << 20;

/// The first line each way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`] of the speaker.
    pub protocol: u32,
    /// The program and its version, for messages.
    pub program: String,
}

impl Hello {
    /// The hello of this program.
    pub fn new() -> Hello {
        Hello {
            protocol: VERSION,
            program: concat!("snapback ", env!("CARGO_PKG_VERSION")).into(),
        }
    }
}

impl Default for Hello {
    fn default() -> Self {
        Hello::new()
    }
}

/// Which files go back with a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FileOptions {
    /// Whether any do.
    pub include: bool,
    /// Mount points, as the tree sees them, of bind mounts to be taken in.
    pub volumes: Vec<PathBuf>,
    /// The most bytes to be kept by copy, of files and of memory, for all checkpoints of the keeper: older ones are released
    /// that are not pinned; refused if files need more.
    pub max_bytes: Option<u64>,
}

/// What becomes of a checkpoint that is taken, and of older ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct KeepOptions {
    /// It is released by name only.
    pub pin: bool,
    /// The most that are kept which are not pinned; older ones are released.
    pub most: Option<usize>,
}

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Take a checkpoint under this name.
    Checkpoint {
        /// Its name.
        name: String,
        /// Which files go back with it.
        files: FileOptions,
        /// What becomes of it and of others.
        #[serde(default)]
        keep: KeepOptions,
    },
    /// Roll the tree back to this checkpoint.
    Rollback {
        /// The checkpoint's name.
        name: String,
        /// Compare everything with the checkpoint before the tree runs again.
        verify: bool,
    },
    /// Tell what has become of files since this checkpoint.
    Diff {
        /// The checkpoint's name.
        name: String,
    },
    /// Take a checkpoint and write it to disk, and end the tree.
    MoveOut {
        /// The directory, absolute.
        to: PathBuf,
        /// How pages are written.
        encoding: Encoding,
        /// Which files are included.
        files: FileOptions,
    },
    /// Tell what is in a checkpoint.
    Inspect {
        /// The checkpoint's name.
        name: String,
    },
    /// Write a checkpoint to disk. Answered by any number of [`Response::Progress`] and one that ends it; a client that hangs
    /// up before cancels it.
    Persist {
        /// The checkpoint's name.
        name: String,
        /// The directory, absolute.
        to: PathBuf,
        /// How pages are written.
        encoding: Encoding,
        /// What it is called there, if not as in RAM.
        called: Option<String>,
        /// Leave in the checkpoint what pages its shadows have: for a restore from there right now.
        #[serde(default)]
        lend: bool,
    },
    /// Make of the tree, a container's init that waits to be started, what an image says. The first request of a keeper.
    Restore {
        /// The name of the checkpoint that it has then.
        name: String,
        /// The directory of the image, absolute.
        from: PathBuf,
        /// Compare everything with the image before it runs.
        verify: bool,
        /// Pages may be in another keeper's checkpoint.
        #[serde(default)]
        lent: bool,
    },
    /// Check whether the container, which has ended, can be made again of this checkpoint, and prepare that.
    PrepareAgain {
        /// The checkpoint's name.
        name: String,
    },
    /// Make of the init of the container, created anew, what was prepared.
    MakeAgain {
        /// The checkpoint's name.
        name: String,
        /// The init's PID; it waits.
        root: i32,
        /// Compare everything with the checkpoint before it runs.
        verify: bool,
    },
    /// The container is about to be deleted: the checkpoints end with it, at once if it has ended.
    EndWithContainer,
    /// List the checkpoints.
    Checkpoints,
    /// Free one checkpoint, or all.
    Release {
        /// The checkpoint's name; all of them if absent.
        name: Option<String>,
    },
}

/// What the keeper answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    /// A checkpoint was taken or a rollback done.
    Done {
        /// What was done and what it took.
        report: Report,
    },
    /// The checkpoints there are.
    Checkpoints {
        /// Oldest first.
        checkpoints: Vec<CheckpointInfo>,
    },
    /// What has become of files.
    Changes {
        /// In the order of paths.
        changes: Vec<Change>,
    },
    /// What is in a checkpoint.
    Inspection {
        /// It.
        inspection: Box<Inspection>,
    },
    /// How far the writing of an image is.
    Progress {
        /// Bytes of memory that are done.
        done: u64,
        /// Bytes of memory in all; 0 before that is known.
        total: u64,
    },
    /// A checkpoint is on disk.
    Persisted {
        /// What was written.
        summary: Summary,
    },
    /// A container can be made again.
    Prepared {
        /// Where standard input, output and error of its init led; null: nowhere.
        streams: [Option<Stream>; 3],
    },
    /// The checkpoint or checkpoints are freed.
    Released {
        /// How many are left; with none left the keeper ends.
        left: usize,
    },
    /// Nothing was done.
    Failure(Failure),
}

/// A file that is not as it was at a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// What has become of it.
    pub kind: ChangeKind,
    /// Where it is, as the tree sees it. Control characters, backslashes and bytes that are no UTF-8 are as `\xNN`.
    pub path: String,
    /// Its size in bytes at the checkpoint, if it was a regular file.
    pub before: Option<u64>,
    /// Its size now, if it is one.
    pub after: Option<u64>,
}

/// How a request can fail, in the terms of the program's exit status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "failure", rename_all = "snake_case")]
pub enum Failure {
    /// Nothing was touched.
    #[error("{refusal}")]
    Refused {
        /// What stands in the way.
        refusal: Refusal,
    },
    /// The tree was killed.
    #[error("{message}")]
    Lost {
        /// What went wrong.
        message: String,
    },
    /// An error; nothing was changed.
    #[error("{message}")]
    Error {
        /// What went wrong.
        message: String,
    },
}

/// One checkpoint that a keeper holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// Its name.
    pub name: String,
    /// When it was taken, in seconds since 1970.
    pub taken_at: f64,
    /// Bytes of headers by kind.
    pub kinds: BTreeMap<String, u64>,
    /// Bytes of headers, all kinds together.
    pub header_bytes: u64,
    /// Bytes that were resident in the tree when it was taken.
    pub resident_bytes: u64,
    /// The checkpoint that it came from, if it came from one that is left.
    #[serde(default)]
    pub parent: Option<String>,
    /// Whether the tree was equal to it last.
    #[serde(default)]
    pub current: bool,
    /// Whether it is released by name only.
    #[serde(default)]
    pub pinned: bool,
    /// Whether the container that it was taken of has ended.
    #[serde(default)]
    pub ended: bool,
    /// Bytes of memory that were copied for it when it was taken.
    #[serde(default)]
    pub page_bytes: u64,
    /// Bytes of shared memory, which cannot be kept copy-on-write, in a copy.
    pub copied_bytes: u64,
    /// Bytes of content of files, some of which may be kept for other checkpoints too.
    pub file_bytes: u64,
    /// Where it is besides RAM.
    #[serde(flatten)]
    pub durability: Durability,
}

/// Writes one message and its line end in one piece.
///
/// # Errors
///
/// Those of the stream.
pub fn send(stream: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = Vec::with_capacity(512);
    append(&mut line, message)?;
    stream.write_all(&line)
}

/// Appends one message and its line end to `line`.
pub(super) fn append(line: &mut Vec<u8>, message: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *line, message)?;
    line.push(b'\n');
    Ok(())
}

/// Reads one message; `None` if the stream ended before a line began.
///
/// # Errors
///
/// Those of the stream; `UnexpectedEof` within a line; `InvalidData` for a line that is too long or is not the
/// message expected.
pub fn receive<T: DeserializeOwned>(stream: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::with_capacity(512);
    let mut limited = io::Read::take(stream, LINE_LIMIT);
    limited.read_until(b'\n', &mut line)?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(serde_json::from_slice(&line)?)),
        Some(_) if line.len() as u64 == LINE_LIMIT => {
            Err(io::Error::new(io::ErrorKind::InvalidData, "line too long"))
        }
        Some(_) => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
