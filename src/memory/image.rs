//! What a checkpoint holds of one address space.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use nix::unistd::Pid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::record::{Context, Kind, ObjectId};

use super::advice::{self, Advised};
use super::layout::Layout;
use super::locks::Locked;
use super::ranges::{Ranges, Span};
use super::shadow::Shadow;
use super::source::{Source, Stored};
use super::store::Slots;
use super::{Error, Result};

/// Payload of an `AddressSpace` record; a list of `Locked`, the spans kept in RAM, follows. The records `VmaList` (the text
/// of `/proc/PID/maps`) and `PopulatedRanges` (a list of [`Span`]) have the same object id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct AddressSpaceHeader {
    /// PID of the process it is reached by, as all records of the context call it.
    pub pid: u32,
    /// PID of the shadow.
    pub shadow: u32,
    /// The program break in bytes, as brk(2) gives it.
    pub brk: u64,
    /// First address of the window, which is not the program's.
    pub window_start: u64,
    /// First address after the window.
    pub window_end: u64,
    /// How what is mapped from then on was to be locked: flags of mlockall(2).
    pub locks_future: u64,
}

/// The image of one address space.
#[derive(Debug)]
pub struct SpaceImage {
    /// The object id of its records.
    pub id: ObjectId,
    /// The process it is reached by.
    pub pid: Pid,
    /// Keeps the pages.
    pub source: Arc<Source>,
    /// The VMA list, as the `VmaList` record has it.
    pub layout: Layout,
    /// Pages that are in the store of the window, so that they need not be fetched again.
    pub(super) slots: Slots,
    pub(super) advice: OnceCell<Vec<Advised>>,
    guards: OnceCell<Ranges>,
    /// Files of VMAs that are not in the shadow: `O_PATH` descriptors, by device and inode.
    pub(super) pins: BTreeMap<(u64, u64), Arc<File>>,
    /// As in its header.
    pub(super) locks_future: u64,
    /// The text of the VMA list once the process was made again: its window is another.
    pub(super) new_text: Option<Vec<u8>>,
    /// Which of the process's address spaces it is of.
    pub(super) generation: u64,
}

impl SpaceImage {
    pub(super) fn new(
        id: ObjectId,
        pid: Pid,
        generation: u64,
        source: Source,
        layout: Layout,
        locks_future: u64,
    ) -> Self {
        Self {
            id,
            pid,
            source: Arc::new(source),
            layout,
            slots: Slots::default(),
            advice: OnceCell::new(),
            guards: OnceCell::new(),
            pins: BTreeMap::new(),
            locks_future,
            new_text: None,
            generation,
        }
    }

    /// The shadow that has pages of it; refused if they are only on disk.
    pub fn shadow(&self) -> Result<&Shadow> {
        Ok(&self.source.resident(self.pid)?.base.shadow)
    }

    /// The image of an address space that a context has the records of, and that is stored elsewhere: of a process that
    /// is `pid` now or, if that is yet to be made, will be called so.
    ///
    /// # Errors
    ///
    /// A record is missing or does not read as it should.
    pub fn stored(context: &Context, id: ObjectId, pid: Pid, stored: Stored) -> Result<Self> {
        let damaged = |kind, problem: &str| {
            Error::Record(crate::record::Error::Payload {
                kind,
                id,
                problem: problem.into(),
            })
        };
        let find = |kind| {
            context
                .find(kind, id)
                .ok_or_else(|| damaged(kind, "it is missing"))
        };
        let header = *find(Kind::AddressSpace)?.fixed::<AddressSpaceHeader>()?.0;
        let window = Span {
            start: header.window_start,
            end: header.window_end,
        };
        let layout = Layout::parse(find(Kind::VmaList)?.payload(), Some(window));
        let layout = layout.ok_or_else(|| damaged(Kind::VmaList, "it is no list of VMAs"))?;
        let source = Source::Stored(stored);
        Ok(Self::new(id, pid, 0, source, layout, header.locks_future))
    }

    /// Names the address space that it is of in the tree.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Its header, read in place.
    pub fn header<'c>(&self, context: &'c Context) -> Result<&'c AddressSpaceHeader> {
        Ok(self.record(context, Kind::AddressSpace)?.fixed()?.0)
    }

    /// What madvise(2) and mlock(2) had set on its VMAs. Read from the shadow when first asked for, which takes time:
    /// ask before the tree is stopped.
    pub fn advice(&self, context: &Context) -> Result<&[Advised]> {
        if self.advice.get().is_none() {
            let read = advice::read(&self.source, &self.layout, self.locked(context)?)?;
            return Ok(self.advice.get_or_init(|| read));
        }
        Ok(self.advice.get().map_or(&[], Vec::as_slice))
    }

    /// Whether any of its memory was locked, as far as the advice was read.
    pub(super) fn has_locks(&self) -> bool {
        let advice = self.advice.get();
        advice.is_some_and(|list| list.iter().any(Advised::is_locked))
    }

    /// Its guards (`MADV_GUARD_INSTALL`), which fork gives to the shadow. Read from there when first asked for: ask before
    /// the tree is stopped.
    pub fn guards(&self) -> Result<&Ranges> {
        if self.guards.get().is_none() {
            let found = self.source.guards(&self.layout)?;
            return Ok(self.guards.get_or_init(|| found));
        }
        Ok(self.guards.get_or_init(Ranges::new))
    }

    /// The spans that were locked in RAM.
    fn locked<'c>(&self, context: &'c Context) -> Result<&'c [Locked]> {
        Ok(self
            .record(context, Kind::AddressSpace)?
            .fixed_list::<AddressSpaceHeader, Locked>()?
            .1)
    }

    /// The text of its VMA list, read in place.
    pub fn maps_text<'c>(&self, context: &'c Context) -> Result<&'c [u8]> {
        Ok(self.record(context, Kind::VmaList)?.payload())
    }

    /// Its populated pages.
    pub fn populated(&self, context: &Context) -> Result<Ranges> {
        Ok(self
            .record(context, Kind::PopulatedRanges)?
            .list::<Span>()?
            .iter()
            .copied()
            .collect())
    }

    fn record<'c>(&self, context: &'c Context, kind: Kind) -> Result<crate::record::Record<'c>> {
        context.find(kind, self.id).ok_or_else(|| {
            Error::Freeze(crate::freeze::Error::System {
                what: format!("{kind:?} record of pid {}", self.pid),
                error: std::io::ErrorKind::NotFound.into(),
            })
        })
    }
}
