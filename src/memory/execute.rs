//! Making an address space equal to an image, as planned.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::freeze::{self, Batch, Stopped};
use crate::kernel::maps::Vma;
use crate::kernel::pagemap::Scan;
use crate::kernel::procfs;
use crate::record::Context;

use super::advice::Advised;
use super::fill::{self, force};
use super::image::SpaceImage;
use super::layout::LayoutChange;
use super::locks;
use super::plan::Plan;
use super::ranges::{Ranges, Span};
use super::source::{Mapped, Source};
use super::space::{Copied, Space, system};
use super::store::runs;
use super::{PAGE, Result};

/// Page tables are re-armed in blocks of what one of them maps.
const BLOCK: u64 = 2 << 20;
/// Linux 6.13; it drops what is there.
const MADV_GUARD_INSTALL: i32 = 102;
const MADV_GUARD_REMOVE: i32 = 103;
/// As `MADV_DONTNEED`, also in memory that mlock2(2) keeps once it is touched (Linux 5.18).
const MADV_DONTNEED_LOCKED: i32 = 24;

impl Space {
    /// Puts the VMA list back and drops pages that were not there.
    pub fn restore_layout(
        &self,
        stopped: &mut Stopped,
        image: &SpaceImage,
        plan: &Plan,
    ) -> Result<()> {
        let pid = self.pid;
        let mut batch = Batch::new();
        if !plan.layout.is_empty() && self.has_future_to_unlock(stopped, image)? {
            locks::restore_future(&mut batch, 0);
        }
        // The break goes down only while the heap is mapped, and up only where nothing else is: so once before, and
        // once after.
        if let Some(brk) = plan.brk {
            batch.call(libc::SYS_brk, &[brk.into()]);
        }
        for change in &plan.layout {
            if let LayoutChange::Unmap(span) = change {
                batch.call(libc::SYS_munmap, &[span.start.into(), span.len().into()]);
            }
        }
        let brk = plan.brk.map(|brk| batch.call(libc::SYS_brk, &[brk.into()]));
        self.run_all(stopped, &mut batch, "munmap or brk", |outputs| {
            brk.is_none_or(|step| outputs.result(step).ok() == plan.brk)
        })?;

        let (mut mapped, mut passed) = (None, None);
        for change in &plan.layout {
            if let LayoutChange::Map(vma) = change {
                let mapped = match &mut mapped {
                    Some(read) => read,
                    unread => unread.insert(image.source.mapped()?),
                };
                map(stopped, pid, image, vma, mapped, &mut passed)?;
            }
        }
        if let Some((_, descriptor)) = passed {
            batch.call(libc::SYS_close, &[descriptor.into()]);
        }
        for change in &plan.layout {
            if let LayoutChange::Protect(span, prot) = change {
                self.make_room(stopped, &mut batch)?;
                batch.call(
                    libc::SYS_mprotect,
                    &[
                        span.start.into(),
                        span.len().into(),
                        u32::from(*prot).into(),
                    ],
                );
            }
        }
        self.run_all(stopped, &mut batch, "mprotect", |_| true)?;
        plan.register
            .iter()
            .filter_map(|span| image.layout.at(span.start))
            .try_for_each(|vma| self.register_vma(vma))
    }

    /// Whether all has to be unlocked, or may be, so that what is mapped from now on is not locked. Where memory is locked
    /// that has to stay so, the process is asked: to lock it again would take as long as it is large.
    fn has_future_to_unlock(&self, stopped: &mut Stopped, image: &SpaceImage) -> Result<bool> {
        if image.locks_future != 0 || !image.has_locks() {
            return Ok(image.locks_future == 0);
        }
        let mut batch = Batch::new();
        let question = locks::Question::add(&mut batch);
        let done = stopped.run(self.pid, &batch)?;
        Ok(question.read(&done) != 0)
    }

    fn make_room(&self, stopped: &mut Stopped, batch: &mut Batch) -> Result<()> {
        if batch.has_room(1, 0) {
            Ok(())
        } else {
            self.run_all(stopped, batch, "madvise", |_| true)
        }
    }

    /// Runs a batch every step of which must succeed, and empties it.
    fn run_all(
        &self,
        stopped: &mut Stopped,
        batch: &mut Batch,
        what: &'static str,
        check: impl Fn(&freeze::Outputs) -> bool,
    ) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let outputs = stopped.run(self.pid, &std::mem::take(batch))?;
        let failure = outputs.first_failure().map(|(_, errno)| errno);
        match failure.or_else(|| (!check(&outputs)).then_some(Errno::ENOMEM)) {
            None => Ok(()),
            Some(errno) => Err(freeze::Error::Call {
                pid: self.pid,
                what,
                errno,
            }
            .into()),
        }
    }

    /// Drops pages that were not there, sets guards and what else madvise(2) and mlock(2) had set, and copies pages back,
    /// inside the target where it may write to them. The last batch of it is only started: [`Space::finish_copy`] waits for
    /// it, so that many processes copy at the same time.
    pub fn start_copy(
        &mut self,
        stopped: &mut Stopped,
        image: &mut SpaceImage,
        context: &Context,
        plan: &Plan,
    ) -> Result<Copied> {
        super::aio::empty(self.pid, &image.layout)?;
        let pid = self.pid;
        let pages = &plan.copy;
        let (cached, missing) = runs(pages, &image.slots);
        let (fetched, overflow) = match plan.remade {
            true => (Vec::new(), missing),
            false => self.fetch(stopped, image, &missing)?,
        };
        let mut batch = Batch::new();
        for (pages, advice) in [
            (&plan.unguard, MADV_GUARD_REMOVE),
            (&plan.guard, MADV_GUARD_INSTALL),
            (&plan.drop, MADV_DONTNEED_LOCKED),
        ] {
            for span in pages.spans() {
                self.flush(stopped, &mut batch, 1)?;
                let arguments = [span.start.into(), span.len().into(), advice.into()];
                let step = batch.call(libc::SYS_madvise, &arguments);
                batch.must_succeed(step);
            }
        }
        if plan.remade {
            let outputs = stopped.run(pid, &std::mem::take(&mut batch))?;
            self.check(&outputs)?;
            fill::new(&self.tracker, stopped.member(pid)?, image, &overflow)?;
        }
        if image.locks_future != 0 || self.has_future_to_unlock(stopped, image)? {
            self.flush(stopped, &mut batch, 1)?;
            locks::restore_future(&mut batch, image.locks_future);
        }
        let has_locks = image.has_locks();
        for advised in image.advice(context)? {
            self.flush(stopped, &mut batch, Advised::STEPS)?;
            advised.apply(&mut batch, has_locks);
        }
        let window = stopped.member(pid)?.window.as_ref();
        let address = window.ok_or(freeze::Error::Gone(pid))?.address;
        let writable = |span: Span| {
            let both = (libc::PROT_READ | libc::PROT_WRITE) as u8;
            image
                .layout
                .at(span.start)
                .is_some_and(|vma| vma.prot & both == both && vma.end >= span.end)
        };
        for run in cached.iter().chain(&fetched) {
            if writable(run.span) {
                self.flush(stopped, &mut batch, 1)?;
                let from = address + Self::slot_offset(run.slot) as u64;
                batch.copy(run.span.start.into(), from.into(), run.span.len() as usize);
            } else {
                let mut bytes = vec![0; run.span.len() as usize];
                let member = stopped.member(pid)?;
                if let Some(window) = &member.window {
                    window.window.read(Self::slot_offset(run.slot), &mut bytes);
                }
                force(&member.memory, pid, run.span, &bytes)?;
            }
        }
        stopped.start(pid, &batch)?;
        if !plan.remade {
            fill::with(&stopped.member(pid)?.memory, pid, &image.source, &overflow)?;
        }
        Ok(Copied {
            pages: pages.pages(),
            bytes: pages.bytes(),
        })
    }

    /// Waits until what [`Space::start_copy`] has started is done.
    pub fn finish_copy(&self, stopped: &mut Stopped) -> Result<()> {
        let outputs = stopped.finish(self.pid)?;
        self.check(&outputs)
    }

    /// Runs what a batch has so far if it has no room for `steps` more.
    fn flush(&self, stopped: &mut Stopped, batch: &mut Batch, steps: usize) -> Result<()> {
        if batch.has_room(steps, 0) {
            return Ok(());
        }
        let outputs = stopped.run(self.pid, &std::mem::take(batch))?;
        self.check(&outputs)
    }

    /// Whether pages were dropped and guards set. Copies can't fail but by a signal, which is an error of the batch; and
    /// kinds of memory that know nothing of an advice refuse it.
    fn check(&self, outputs: &freeze::Outputs) -> Result<()> {
        let pid = self.pid;
        let what = "madvise";
        match outputs.cut_short {
            None => Ok(()),
            Some(errno) => Err(freeze::Error::Call { pid, what, errno }.into()),
        }
    }

    /// Fetches pre-images from the shadow into the page store. What does not fit is returned as the second value.
    fn fetch(
        &mut self,
        stopped: &mut Stopped,
        image: &mut SpaceImage,
        missing: &Ranges,
    ) -> Result<(Vec<super::store::Run>, Ranges)> {
        if missing.is_empty() {
            return Ok((Vec::new(), Ranges::new()));
        }
        let mut stored = Ranges::new();
        let mut overflow = Ranges::new();
        for span in missing.spans() {
            let mut at = span.start;
            while at < span.end {
                let page = Span {
                    start: at,
                    end: at + PAGE,
                };
                match self.store.take() {
                    Some(slot) => {
                        image.slots.insert(at, slot);
                        stored.push(page);
                    }
                    None => overflow.push(page),
                }
                at += PAGE;
            }
        }
        let (runs, _) = runs(&stored, &image.slots);
        let window = stopped
            .tree_mut()
            .member_mut(self.pid)
            .and_then(|member| member.window.as_mut());
        let window = &mut window.ok_or(freeze::Error::Gone(self.pid))?.window;
        // Runs whose slots follow one another are read in one go.
        let mut at = 0;
        while at < runs.len() {
            let mut end = at + 1;
            let mut slots = runs[at].span.len() / PAGE;
            while end < runs.len() && u64::from(runs[end].slot) == u64::from(runs[at].slot) + slots
            {
                slots += runs[end].span.len() / PAGE;
                end += 1;
            }
            let spans: Vec<Span> = runs[at..end].iter().map(|run| run.span).collect();
            let buffer =
                window.store_mut(Self::slot_offset(runs[at].slot), (slots * PAGE) as usize);
            image
                .source
                .read(&spans, buffer)
                .map_err(|error| system(self.pid, "read its shadow", error))?;
            at = end;
        }
        Ok((runs, overflow))
    }

    /// Arms the pages again, with what else was written in their blocks; or leaves them as they are, if that is likely to
    /// be cheaper.
    pub fn rearm(&mut self, stopped: &Stopped, image: &SpaceImage, pages: &Ranges) -> Result<()> {
        if pages.is_empty() || self.hot.leaves(pages.pages()) {
            return Ok(());
        }
        let mut found = Vec::new();
        for block in blocks(pages).spans() {
            let pagemap = &stopped.member(self.pid)?.pagemap;
            image
                .layout
                .scan(pagemap, Scan::Rearm, *block, &mut found)
                .map_err(|errno| system(self.pid, "arm its pages", errno))?;
        }
        Ok(())
    }

    /// Bytes of pre-images in the page store.
    pub fn store_bytes(&self) -> u64 {
        self.store.bytes()
    }
}

/// The blocks that have these pages.
pub(super) fn blocks(pages: &Ranges) -> Ranges {
    let spans = pages.spans().iter();
    let blocks = spans.map(|span| Span {
        start: span.start & !(BLOCK - 1),
        end: span.end.next_multiple_of(BLOCK),
    });
    blocks.collect()
}

/// A descriptor of the process, of a file that is mapped: its device and inode, and whether it is mapped shared. The next VMA
/// is often of the same.
type Passed = ((u64, u64, bool), i32);

/// Maps what was there.
fn map(
    stopped: &mut Stopped,
    pid: Pid,
    image: &SpaceImage,
    vma: &Vma,
    mapped: &Mapped,
    passed: &mut Option<Passed>,
) -> Result<()> {
    let is_same_file = |of: &&Vma| (of.device, of.inode) == (vma.device, vma.inode);
    let of_shadow = mapped.vmas.iter().find(is_same_file);
    let flags = mapped
        .flags
        .iter()
        .find(|flags| flags.start <= vma.start && flags.end > vma.start);
    let has = |flag: &str| flags.is_some_and(|flags| flags.has(flag));
    if attach(stopped, pid, image, vma)? {
        return Ok(());
    }
    let mut mmap_flags = libc::MAP_FIXED
        | if vma.shared {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE
        };
    for (name, bit) in [("gd", libc::MAP_GROWSDOWN), ("nr", libc::MAP_NORESERVE)] {
        if has(name) {
            mmap_flags |= bit;
        }
    }
    let mut batch = Batch::new();
    let key = (vma.device, vma.inode, vma.shared);
    let descriptor = match *passed {
        _ if vma.is_anonymous() => {
            mmap_flags |= libc::MAP_ANONYMOUS;
            -1
        }
        Some((of, descriptor)) if of == key => descriptor,
        before => {
            if let Some((_, descriptor)) = before {
                batch.call(libc::SYS_close, &[descriptor.into()]);
                stopped.run(pid, &std::mem::take(&mut batch))?;
                *passed = None;
            }
            let file = open_mapped(image, vma, of_shadow)?;
            let descriptor = stopped.pass_descriptor(pid, file.as_fd())?;
            *passed = Some((key, descriptor));
            descriptor
        }
    };
    let mapped = batch.call(
        libc::SYS_mmap,
        &[
            vma.start.into(),
            vma.len().into(),
            u32::from(vma.prot).into(),
            mmap_flags.into(),
            descriptor.into(),
            vma.offset.into(),
        ],
    );
    batch.must_succeed(mapped);
    let outputs = stopped.run(pid, &batch)?;
    outputs.result(mapped).map(drop).map_err(|errno| {
        freeze::Error::Call {
            pid,
            what: "mmap",
            errno,
        }
        .into()
    })
}

/// Attaches a System V shared memory segment where it was, if `vma` is of one and it was attached whole; else it can only
/// be mapped like a file.
fn attach(stopped: &mut Stopped, pid: Pid, image: &SpaceImage, vma: &Vma) -> Result<bool> {
    const SHM_EXEC: i32 = 0o100000;
    if !vma.is_segment() {
        return Ok(false);
    }
    let whole = image.layout.at(vma.start).filter(|vma| vma.offset == 0);
    let Some(whole) = whole else {
        return Ok(false);
    };
    let mut flags = libc::SHM_REMAP;
    for (bit, flag, wanted) in [
        (libc::PROT_WRITE, libc::SHM_RDONLY, false),
        (libc::PROT_EXEC, SHM_EXEC, true),
    ] {
        if (i32::from(whole.prot) & bit != 0) == wanted {
            flags |= flag;
        }
    }
    let mut batch = Batch::new();
    let info = batch.output(SEGMENT_INFO);
    let arguments = [whole.inode.into(), libc::IPC_STAT.into(), info.arg()];
    let asked = batch.call(libc::SYS_shmctl, &arguments);
    let outputs = stopped.run(pid, &batch)?;
    let size = outputs.bytes(&info)[SEGMENT_SIZE_AT..].first_chunk();
    let size = size.map_or(0, |bytes| u64::from_ne_bytes(*bytes));
    if outputs.result(asked).is_err() || size.next_multiple_of(PAGE) != whole.len() {
        return Ok(false);
    }
    let mut batch = Batch::new();
    let arguments = [whole.inode.into(), whole.start.into(), flags.into()];
    let attached = batch.call(libc::SYS_shmat, &arguments);
    let outputs = stopped.run(pid, &batch)?;
    Ok(outputs.result(attached) == Ok(whole.start))
}

/// Bytes of `struct shmid_ds`, and where the size is in it.
const SEGMENT_INFO: usize = size_of::<libc::shmid_ds>();
const SEGMENT_SIZE_AT: usize = std::mem::offset_of!(libc::shmid_ds, shm_segsz);

/// Opens the file behind a VMA through the shadow, which has it mapped, whatever became of its name.
fn open_mapped(image: &SpaceImage, vma: &Vma, of_shadow: Option<&Vma>) -> Result<File> {
    let failed = |error| {
        let what = format!("open the file mapped at {vma:?}");
        system(image.pid, &what, error)
    };
    let shadow = match &*image.source {
        Source::Resident(resident) => resident.base.shadow.pid,
        Source::Stored(stored) => {
            let opened = stored.open_mapped(vma);
            return opened
                .unwrap_or_else(|| Err(Errno::ENOENT.into()))
                .map_err(failed);
        }
    };
    let open = |path: &std::path::Path| {
        OpenOptions::new()
            .read(true)
            .write(vma.shared)
            .open(path)
            .or_else(|_| File::open(path))
    };
    let pin = image.pins.get(&(vma.device, vma.inode));
    let result = match of_shadow {
        None if pin.is_some() => {
            let number = pin.map_or(-1, |pin| pin.as_raw_fd());
            open(std::path::Path::new(&format!("/proc/self/fd/{number}")))
        }
        Some(found) => open(&procfs::path(
            shadow,
            &format!("map_files/{:x}-{:x}", found.start, found.end),
        )),
        None => {
            use std::os::unix::ffi::OsStrExt;
            let inside =
                std::ffi::OsStr::from_bytes(vma.name.strip_prefix(b"/").unwrap_or(&vma.name));
            open(&procfs::path(image.pid, "root").join(inside))
        }
    };
    result.map_err(failed)
}
