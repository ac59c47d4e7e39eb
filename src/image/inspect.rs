//! Looks into an image, also a damaged one, as far as it goes, or into a checkpoint in RAM.

use std::collections::BTreeMap;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::layout::{Info, NamelessFile, Program};
use super::open::open_in;
use super::pages::Store;
use super::view::{DescriptorView, ProcessView, SpaceView, View};
use super::{CONTEXT_FILE, Error, MEMORY_FILE};
use crate::checkpoint::Checkpoint;
use crate::filesystem::StoredArea;
use crate::memory::PAGE;
use crate::record::{Context, Frames, ImageHeader, Kind, Stats};

/// Most problems that are listed.
const MOST: usize = 100;

/// What is in an image.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Inspection {
    /// The directory; `None`: a checkpoint in RAM.
    pub directory: Option<PathBuf>,
    /// Where and when it was made.
    pub made: Option<Made>,
    /// The checkpoint.
    pub checkpoint: Option<Info>,
    /// The files that it consists of.
    pub files: Vec<FileView>,
    /// Records by their kind.
    pub kinds: Vec<KindView>,
    /// Processes.
    pub processes: Vec<ProcessView>,
    /// Address spaces.
    pub spaces: Vec<SpaceView>,
    /// Objects of shared memory: their names, and bytes of data.
    pub shared: Vec<(String, u64)>,
    /// Descriptors.
    pub descriptors: Vec<DescriptorView>,
    /// File systems whose files are in it.
    pub areas: Vec<AreaView>,
    /// Files without a name whose contents are in it.
    pub nameless: Vec<NamelessFile>,
    /// What is wrong with it: file, record and offset. Empty: all of it was read and all checksums are right.
    pub problems: Vec<String>,
}

/// Where and when an image was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// Nanoseconds since 1970.
    pub created_ns: u64,
    /// The machine as ELF numbers it: 62 is x86-64.
    pub machine: u32,
    /// The kernel's release.
    pub kernel: String,
    /// Version of snapback.
    pub writer: String,
}

/// A file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileView {
    /// Its name in the directory.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Records in it that were read.
    pub records: u64,
}

/// A file system whose files are in an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AreaView {
    /// Where it was mounted.
    pub mount_point: PathBuf,
    /// How many files and directories of it are in the image.
    pub files: usize,
    /// How many contents of files.
    pub contents: u64,
}

/// The records of a kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KindView {
    /// The kind in words.
    pub kind: String,
    /// The file they are in.
    pub file: String,
    /// How many.
    pub records: u64,
    /// Bytes of their payloads.
    pub payload_bytes: u64,
}

impl From<&ImageHeader> for Made {
    fn from(header: &ImageHeader) -> Self {
        Self {
            created_ns: header.created_ns,
            machine: header.machine,
            kernel: header.kernel_release(),
            writer: header.writer(),
        }
    }
}

impl Inspection {
    /// Looks into a checkpoint in RAM.
    pub fn of_checkpoint(checkpoint: &Checkpoint) -> Self {
        let mut inspection = Self {
            checkpoint: Some(Info::of(checkpoint)),
            ..Self::default()
        };
        inspection.add_context(&checkpoint.context);
        inspection
    }

    /// Looks into the image in a directory and checks all of it.
    pub fn of_directory(directory: &Path) -> Self {
        let mut inspection = Self {
            directory: Some(directory.to_owned()),
            ..Self::default()
        };
        match open_in(directory, CONTEXT_FILE) {
            Err(error) => inspection.add_problem(error),
            Ok((path, file)) => {
                let bytes = file.metadata().map_or(0, |metadata| metadata.len());
                let (context, error) =
                    Context::load_damaged(BufReader::with_capacity(1 << 20, file));
                inspection.add_context(&context);
                inspection.files.push(FileView {
                    name: CONTEXT_FILE.into(),
                    bytes,
                    records: context.stats().records,
                });
                if let Some(reason) = context.failure() {
                    inspection.add_problem(format!("the checkpoint had failed: {reason}"));
                }
                if let Some(error) = error {
                    inspection.add_problem(Error::image(&path)(error));
                }
            }
        }
        match open_in(directory, MEMORY_FILE) {
            Err(error) => inspection.add_problem(error),
            Ok((path, file)) => {
                let bytes = file.metadata().map_or(0, |metadata| metadata.len());
                let (frames, error) = Frames::open_damaged(file);
                if let Some(error) = error {
                    inspection.add_problem(Error::image(&path)(error));
                }
                let records = frames.as_ref().map_or(0, |frames| frames.frames().len());
                inspection.files.push(FileView {
                    name: MEMORY_FILE.into(),
                    bytes,
                    records: records as u64,
                });
                if let Some(frames) = frames {
                    inspection.add_memory(frames, path);
                }
            }
        }
        // Whatever does not fit together although all records are good.
        if inspection.problems.is_empty()
            && let Err(error) = super::Opened::open(directory)
        {
            inspection.add_problem(error);
        }
        inspection
    }

    fn add_problem(&mut self, problem: impl ToString) {
        match self.problems.len() {
            0..MOST => self.problems.push(problem.to_string()),
            MOST => self.problems.push("and more".into()),
            _ => {}
        }
    }

    fn add_context(&mut self, context: &Context) {
        self.made = context.image_header().as_ref().map(Made::from);
        self.add_kinds(context.stats(), CONTEXT_FILE);
        let View {
            processes,
            spaces,
            shared,
            descriptors,
            problems,
        } = View::of(context);
        self.processes = processes;
        self.spaces = spaces;
        self.shared = shared;
        self.descriptors = descriptors;
        problems
            .into_iter()
            .for_each(|problem| self.add_problem(problem));
    }

    fn add_kinds(&mut self, stats: &Stats, file: &str) {
        for (kind, stats) in &stats.by_kind {
            self.kinds.push(KindView {
                kind: kind.name().into(),
                file: file.into(),
                records: stats.records,
                payload_bytes: stats.payload_bytes,
            });
        }
    }

    fn add_memory(&mut self, frames: Frames, path: PathBuf) {
        self.made = self
            .made
            .take()
            .or_else(|| Some(frames.image_header().into()));
        let mut kinds: BTreeMap<Kind, (u64, u64)> = BTreeMap::new();
        for frame in frames.frames() {
            let (records, bytes) = kinds.entry(frame.kind()).or_default();
            *records += 1;
            *bytes += frame.payload_len();
        }
        for (kind, (records, payload_bytes)) in kinds {
            self.kinds.push(KindView {
                kind: kind.name().into(),
                file: MEMORY_FILE.into(),
                records,
                payload_bytes,
            });
        }
        for frame in frames.frames() {
            let wanted = [
                Kind::Checkpoint,
                Kind::NamelessFile,
                Kind::FileArea,
                Kind::Program,
            ];
            if !wanted.contains(&frame.kind()) {
                continue;
            }
            let payload = frames.payload(frame).map_err(Error::image(&path));
            let payload = match payload {
                Ok(payload) => payload,
                Err(error) => {
                    self.add_problem(error);
                    continue;
                }
            };
            let added = match frame.kind() {
                Kind::Checkpoint => {
                    serde_json::from_slice(&payload).map(|info| self.checkpoint = Some(info))
                }
                Kind::NamelessFile => {
                    serde_json::from_slice(&payload).map(|file| self.nameless.push(file))
                }
                Kind::FileArea => serde_json::from_slice(&payload).map(|area: StoredArea| {
                    self.areas.push(AreaView {
                        mount_point: area.mount_point(),
                        files: area.files(),
                        contents: area.contents,
                    });
                }),
                _ => serde_json::from_slice(&payload).map(|program: Program| {
                    let mut spaces = self.spaces.iter_mut();
                    if let Some(space) = spaces.find(|space| space.id == frame.id().raw()) {
                        space.program = Some(program.path);
                    }
                }),
            };
            if let Err(error) = added {
                let at = frame.position();
                self.add_problem(format!("{}: {at}: {error}", path.display()));
            }
        }
        let store = match Store::new(frames, path) {
            Ok(store) => store,
            Err(error) => return self.add_problem(error),
        };
        for space in &mut self.spaces {
            let runs = crate::record::ObjectId::from_raw(space.id).and_then(|id| store.index(id));
            let pages = runs.into_iter().flatten().map(|run| u64::from(run.pages));
            space.written_bytes = Some(pages.sum::<u64>() * PAGE);
        }
        for problem in store.problems() {
            self.add_problem(problem);
        }
    }
}
