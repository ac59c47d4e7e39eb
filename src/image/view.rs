//! What a context holds, for people to look at; as far as its records are good.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::kernel::maps::Vma;
use crate::memory::{AddressSpaceHeader, Layout, PAGE, SharedObject, Span};
use crate::objects::records;
use crate::objects::state::State;
use crate::record::{Context, Kind, ObjectId, Record};
use crate::task::{ProcessRecord, ThreadRecord};

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessView {
    /// PID outside of the container.
    pub pid: i32,
    /// PID inside.
    pub inner_pid: i32,
    /// PID of its parent, outside.
    pub parent: i32,
    /// Its name.
    pub name: String,
    /// Number of threads.
    pub threads: usize,
    /// It had ended and was not reaped.
    pub zombie: bool,
}

/// An address space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceView {
    /// Its object id.
    pub id: u64,
    /// The process that it is of.
    pub pid: i32,
    /// The program, if that is told.
    pub program: Option<PathBuf>,
    /// Bytes that were populated.
    pub populated_bytes: u64,
    /// Bytes of pages that are in the image, those that are there once for several too.
    pub written_bytes: Option<u64>,
    /// Its VMAs.
    pub vmas: Vec<VmaView>,
}

/// A VMA.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmaView {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// As `rw-p`.
    pub rights: String,
    /// Bytes of it that were populated.
    pub populated_bytes: u64,
    /// The file, or what else it is called.
    pub name: String,
}

/// A descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorView {
    /// A process that has it.
    pub pid: i32,
    /// Its number.
    pub fd: i32,
    /// The id of what is open.
    pub object: u64,
    /// Its kind in words.
    pub kind: String,
    /// The file, or what else tells what it is.
    pub what: String,
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) processes: Vec<ProcessView>,
    pub(super) spaces: Vec<SpaceView>,
    pub(super) shared: Vec<(String, u64)>,
    pub(super) descriptors: Vec<DescriptorView>,
    pub(super) problems: Vec<String>,
}

impl View {
    pub(super) fn of(context: &Context) -> Self {
        let mut view = Self::default();
        view.add_processes(context);
        for record in context.records_of(Kind::AddressSpace) {
            match space(context, &record) {
                Ok(space) => view.spaces.push(space),
                Err(problem) => view.problems.push(problem),
            }
        }
        for record in context.records_of(Kind::SharedMemory) {
            match record.fixed::<SharedObject>() {
                Ok((object, name)) => {
                    let name = String::from_utf8_lossy(name).into_owned();
                    view.shared.push((name, object.data));
                }
                Err(error) => view.problems.push(error.to_string()),
            }
        }
        view.add_descriptors(context);
        view
    }

    fn add_processes(&mut self, context: &Context) {
        // Threads refer to their processes by their records' ids.
        let mut threads: BTreeMap<u64, usize> = BTreeMap::new();
        let mut names: BTreeMap<u64, String> = BTreeMap::new();
        for record in context.records_of(Kind::Thread) {
            match record.fixed::<ThreadRecord>() {
                Ok((thread, _)) => {
                    *threads.entry(thread.process).or_default() += 1;
                    names.insert(thread.tid, text(&thread.state.comm));
                    let process = ObjectId::from_raw(thread.process);
                    let is_there =
                        process.is_some_and(|id| context.find(Kind::Process, id).is_some());
                    if !is_there {
                        self.problems.push(format!(
                            "thread {}: there is no process with the id {}",
                            thread.tid, thread.process
                        ));
                    }
                }
                Err(error) => self.problems.push(error.to_string()),
            }
        }
        for record in context.records_of(Kind::Process) {
            match record.fixed::<ProcessRecord>() {
                Ok((process, _)) => {
                    let identity = &process.identity;
                    let name = names.get(&(identity.pid as u64));
                    self.processes.push(ProcessView {
                        pid: identity.pid,
                        inner_pid: identity.namespace_pid,
                        parent: identity.parent,
                        name: name.cloned().unwrap_or_default(),
                        threads: threads.get(&record.id().raw()).copied().unwrap_or(0),
                        zombie: identity.zombie != 0,
                    });
                }
                Err(error) => self.problems.push(error.to_string()),
            }
        }
    }

    fn add_descriptors(&mut self, context: &Context) {
        let (recorded, errors) = records::read_as_far(context);
        let errors = errors.iter().map(ToString::to_string);
        self.problems.extend(errors);
        let kinds: BTreeMap<ObjectId, Kind> = context
            .records()
            .filter(|record| recorded.descriptions.contains_key(&record.id()))
            .map(|record| (record.id(), record.kind()))
            .collect();
        for table in &recorded.tables {
            for slot in &table.slots {
                let Some(description) = recorded.descriptions.get(&slot.description) else {
                    self.problems.push(format!(
                        "fd {} of pid {}: there is no description with the id {}",
                        slot.fd,
                        table.pid(),
                        slot.description
                    ));
                    continue;
                };
                let (_, inode) = description.common.inode();
                let (kind, what) = match &description.state {
                    State::File(file) => (None, file.path.clone()),
                    State::Pipe(pipe) => {
                        let name = pipe.fifo.as_ref().map(ToString::to_string);
                        (Some("pipe"), name.unwrap_or_else(|| inode.to_string()))
                    }
                    _ => (None, inode.to_string()),
                };
                let recorded = kinds.get(&slot.description).map(|kind| kind.name());
                self.descriptors.push(DescriptorView {
                    pid: table.pid(),
                    fd: slot.fd,
                    object: slot.description.raw(),
                    kind: kind.or(recorded).unwrap_or("?").into(),
                    what,
                });
            }
        }
    }
}

fn space(context: &Context, record: &Record<'_>) -> Result<SpaceView, String> {
    let (header, _) = record
        .fixed::<AddressSpaceHeader>()
        .map_err(|error| error.to_string())?;
    let id = record.id();
    let find = |kind: Kind| {
        let found = context.find(kind, id);
        found.ok_or_else(|| format!("there is no {kind} of address space {id}"))
    };
    let window = Span {
        start: header.window_start,
        end: header.window_end,
    };
    let layout = Layout::parse(find(Kind::VmaList)?.payload(), Some(window))
        .ok_or_else(|| format!("the VMA list of address space {id} is none"))?;
    let populated = find(Kind::PopulatedRanges)?;
    let populated = populated
        .list::<Span>()
        .map_err(|error| error.to_string())?;
    let view = |vma: &Vma| VmaView {
        start: vma.start,
        end: vma.end,
        rights: rights(vma),
        populated_bytes: covered(populated, vma),
        name: String::from_utf8_lossy(&vma.name).into_owned(),
    };
    Ok(SpaceView {
        id: id.raw(),
        pid: header.pid as i32,
        program: None,
        populated_bytes: layout.vmas.iter().map(|vma| covered(populated, vma)).sum(),
        written_bytes: None,
        vmas: layout.vmas.iter().map(view).collect(),
    })
}

/// Bytes of a VMA that spans in order cover.
fn covered(spans: &[Span], vma: &Vma) -> u64 {
    let from = spans.partition_point(|span| span.end <= vma.start);
    let within = spans[from..].iter().take_while(|span| span.start < vma.end);
    let bytes = within.map(|span| {
        let end = span.end.min(vma.end);
        end.saturating_sub(span.start.max(vma.start))
    });
    bytes.sum::<u64>() / PAGE * PAGE
}

fn rights(vma: &Vma) -> String {
    let bit = |bit: i32, letter: char| match i32::from(vma.prot) & bit != 0 {
        true => letter,
        false => '-',
    };
    let shared = if vma.shared { 's' } else { 'p' };
    [
        bit(libc::PROT_READ, 'r'),
        bit(libc::PROT_WRITE, 'w'),
        bit(libc::PROT_EXEC, 'x'),
        shared,
    ]
    .into_iter()
    .collect()
}

fn text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&field[..end.unwrap_or(field.len())]).into_owned()
}
