//! What a container is made of: an image.

use std::collections::BTreeSet;
use std::sync::Arc;

use nix::unistd::Pid;

use crate::checkpoint::Result;
use crate::filesystem::{Contents, StoredArea};
use crate::freeze::LEAST_NO_PID;
use crate::image::Opened;
use crate::kernel::maps::{self, Vma};
use crate::memory::{AddressSpaceHeader, PAGE, Span};
use crate::outcome::Refusal;
use crate::record::{Context, Error, Kind, ObjectId, Record};
use crate::task::{self, Renamed};

/// An image of which a container is to be made.
#[derive(Debug)]
pub struct Origin {
    pub(super) image: Opened,
}

impl Origin {
    /// Takes an image that was opened.
    pub fn new(image: Opened) -> Self {
        Self { image }
    }

    /// The name of the checkpoint.
    pub fn name(&self) -> &str {
        &self.image.info.name
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.image.context
    }

    /// The processes and threads in its records.
    pub(super) fn recorded(&self, renamed: &Renamed) -> Result<task::Recorded<'_>> {
        Ok(task::Recorded::read(&self.image.context, renamed)?)
    }

    /// Whether the numbers and parents of processes and threads can be such.
    pub(super) fn check_numbers(&self) -> Result<()> {
        let recorded = self.recorded(&Renamed::default())?;
        let mut seen = BTreeSet::new();
        for process in recorded.processes() {
            let identity = &process.identity;
            let problem = format!("process {} and its threads", identity.pid);
            let damaged = |what: &str| {
                let problem = format!("{problem}: {what}");
                Err(damaged(Kind::Process, ObjectId::IMAGE, problem).into())
            };
            let numbers = process.threads.keys().map(|tid| tid.as_raw());
            let mut numbers = numbers.chain([identity.pid, identity.namespace_pid]);
            if numbers.any(|number| !(1..LEAST_NO_PID).contains(&number)) {
                return damaged("no number of a process");
            }
            let mut tids = process.threads.keys().filter(|tid| **tid != process.pid());
            if !seen.insert(process.pid()) || tids.any(|tid| !seen.insert(*tid)) {
                return damaged("the number of another, too");
            }
            let mut at = process.parent();
            for _ in recorded.processes() {
                match recorded.process(at) {
                    Some(parent) => at = parent.parent(),
                    None => break,
                }
            }
            if recorded.process(at).is_some() {
                return damaged("it is below itself");
            }
        }
        Ok(())
    }

    /// The address space of a recorded process.
    pub(super) fn space_of(&self, recorded: Pid) -> Result<ObjectId> {
        for id in self.image.spaces.keys() {
            if self.header(*id)?.pid == recorded.as_raw() as u32 {
                return Ok(*id);
            }
        }
        let image = &self.image.context;
        let problem = format!("there is none of process {recorded}");
        let id = image
            .records()
            .next()
            .map_or(ObjectId::IMAGE, |record| record.id());
        Err(damaged(Kind::AddressSpace, id, problem).into())
    }

    pub(super) fn header(&self, id: ObjectId) -> Result<&AddressSpaceHeader> {
        Ok(self.find(Kind::AddressSpace, id)?.fixed()?.0)
    }

    /// The VMAs of an address space, without the window and those of the kernel.
    pub(super) fn vmas(&self, id: ObjectId) -> Result<Vec<Vma>> {
        let header = self.header(id)?;
        let record = self.find(Kind::VmaList, id)?;
        let vmas = maps::parse(record.payload());
        let mut vmas =
            vmas.ok_or_else(|| damaged(Kind::VmaList, id, "it is no list of VMAs".into()))?;
        vmas.retain(|vma| vma.start < header.window_start || vma.end > header.window_end);
        vmas.retain(|vma| !vma.is_special());
        Ok(vmas)
    }

    fn find(&self, kind: Kind, id: ObjectId) -> Result<Record<'_>> {
        let found = self.image.context.find(kind, id);
        Ok(found.ok_or_else(|| damaged(kind, id, "it is missing".into()))?)
    }

    /// Refuses System V shared memory that can't be made.
    fn check_segments(&self) -> Result<()> {
        /// `SHM_LOCKED` and `SHM_HUGETLB`.
        const SPECIAL: u32 = 0o6000;
        let refuse = |object: String, remedy: &str| Refusal {
            object,
            holder: "the container".into(),
            remedy: format!("{remedy}; it can't be made of an image yet"),
        };
        let segments = self.image.segments.own().ok_or_else(|| {
            refuse(
                "System V shared memory".into(),
                "it was in another IPC namespace than the container's own",
            )
        })?;
        let kept = self.image.shared().unwrap_or_default();
        for segment in segments {
            let object = || format!("System V shared memory segment {}", segment.id);
            if segment.mode & SPECIAL != 0 {
                return Err(refuse(object(), "it was locked in RAM or of huge pages").into());
            }
            let is_it =
                |name: &str, inode: u64| name.starts_with("/SYSV") && inode == segment.id as u64;
            if !kept
                .iter()
                .any(|(_, object, name)| is_it(name, object.inode))
            {
                return Err(refuse(object(), "no process had it attached").into());
            }
        }
        Ok(())
    }

    /// Refuses memory that can't be made of an image.
    pub(super) fn check_memory(&self) -> Result<()> {
        self.check_segments()?;
        let recorded = self.recorded(&Renamed::default())?;
        for process in recorded.processes().filter(|process| !process.is_zombie()) {
            let id = self.space_of(process.pid())?;
            let policies = self.image.spaces[&id].policies.as_deref();
            if has_policies_of_vmas(process, policies.unwrap_or_default()) {
                return Err(Refusal {
                    object: "a memory policy (mbind)".into(),
                    holder: format!("pid {} ({})", process.pid(), process.comm()),
                    remedy: "it can't be made of an image yet".into(),
                }
                .into());
            }
            for vma in self.vmas(id)? {
                if &*vma.name != b"/[aio] (deleted)" {
                    continue;
                }
                return Err(Refusal {
                    object: "an AIO context (io_setup)".into(),
                    holder: format!("pid {} ({})", process.pid(), process.comm()),
                    remedy: "it can't be made of an image yet; take the checkpoint without it"
                        .into(),
                }
                .into());
            }
        }
        Ok(())
    }
}

impl Origin {
    /// The files that go back with the tree.
    pub(super) fn files(&self) -> impl Iterator<Item = &StoredArea> {
        self.image.files.iter().map(|(_, area)| area)
    }

    /// The object that is a content of a file.
    fn content(&self, (area, number): (usize, u64)) -> ObjectId {
        let first = self.image.files[area].0.raw() + 1;
        ObjectId::from_raw(first + number).unwrap_or(ObjectId::IMAGE)
    }
}

impl Contents for Origin {
    fn data(&self, name: (usize, u64), size: u64) -> Vec<(u64, u64)> {
        let runs = self.image.runs(self.content(name)).iter();
        let parts = runs.map(|run| {
            let end = run.address + u64::from(run.pages) * PAGE;
            (run.address, end.min(size).saturating_sub(run.address))
        });
        parts.filter(|(_, length)| *length > 0).collect()
    }

    fn read(&self, name: (usize, u64), offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        let len = buffer.len();
        let mut pages = vec![0; len.next_multiple_of(PAGE as usize)];
        let span = Span {
            start: offset,
            end: offset + pages.len() as u64,
        };
        let read = self.image.read(self.content(name), &[span], &mut pages);
        read.map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidData, error))?;
        buffer.copy_from_slice(&pages[..len]);
        Ok(())
    }
}

/// Whether there are policies in a text of `numa_maps` that are not that of the task, which all VMAs show that have none.
fn has_policies_of_vmas(process: &task::RecordedProcess<'_>, text: &str) -> bool {
    let of_task = process.threads.get(&process.pid());
    let is_default = of_task.is_none_or(|leader| leader.record.state.memory_policy.mode == 0);
    let mut policies: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .collect();
    policies.sort_unstable();
    policies.dedup();
    match is_default {
        true => policies.iter().any(|policy| *policy != "default"),
        false => policies.len() > 1,
    }
}

pub(super) fn damaged(kind: Kind, id: ObjectId, problem: String) -> Error {
    Error::Payload { kind, id, problem }
}
