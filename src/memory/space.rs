//! Capturing an address space, and what is kept of it as long as any checkpoint of it lives.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::unistd::Pid;
use zerocopy::IntoBytes;

use crate::freeze::{self, Batch, STORE_OFFSET, Stopped};
use crate::kernel::maps::Vma;
use crate::kernel::pagemap::{self, Backing, Categories, Region, Scan};
use crate::kernel::userfaultfd::{USER_MODE_ONLY, WriteTracker};
use crate::kernel::{pidfd, procfs};
use crate::outcome::Refusal;
use crate::record::{Context, Kind};

use super::fork::{self, Fresh};
use super::hot::Hot;
use super::image::{AddressSpaceHeader, SpaceImage};
use super::layout::Layout;
use super::locks;
use super::ranges::{Ranges, Span};
use super::shadow::Shadow;
use super::source::Source;
use super::store::Store;
use super::{PAGE, Result};

/// The least page store a window is given, in bytes. It is address space only until it is filled.
const LEAST_STORE: u64 = 64 << 20;

/// The write tracker and the page store of one address space, shared by all its checkpoints.
#[derive(Debug)]
pub struct Space {
    /// The process it is reached by.
    pub pid: Pid,
    generation: u64,
    pub(super) tracker: WriteTracker,
    pub(super) store: Store,
    pub(super) hot: Hot,
}

/// How much a rollback or checkpoint of an address space did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Pages that were not as they had to be (of a checkpoint: armed).
    pub pages: u64,
    /// Bytes copied.
    pub bytes: u64,
}

impl Copied {
    /// Adds another count to this one.
    pub fn add(&mut self, other: Self) {
        self.pages += other.pages;
        self.bytes += other.bytes;
    }
}

impl Space {
    /// Opens the window into a process and makes its write tracker. Nothing is armed yet.
    pub fn open(stopped: &mut Stopped, pid: Pid) -> Result<Self> {
        let resident = procfs::resident_bytes(pid).unwrap_or(0);
        let store = resident.max(LEAST_STORE) as usize;
        stopped.open_window(pid, store)?;
        let space = Self::track(stopped, pid, store)?;
        space.clear_leftovers(stopped)?;
        Ok(space)
    }

    /// Makes the write tracker of a process that has a window with a page store of `store` bytes.
    pub(super) fn track(stopped: &mut Stopped, pid: Pid, store: usize) -> Result<Self> {
        let mut batch = Batch::new();
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        let made = batch.call(libc::SYS_userfaultfd, &[flags.into()]);
        let outputs = stopped.run(pid, &batch)?;
        let remote = outputs.result(made).map_err(|errno| {
            refuse(
                pid,
                "write tracking",
                format!("userfaultfd(2) failed: {errno}; see `snapback check`"),
            )
        })?;
        let taken = pidfd::get_fd(stopped.member(pid)?.pidfd.as_fd(), remote as i32);
        let mut batch = Batch::new();
        batch.call(libc::SYS_close, &[remote.into()]);
        stopped.run(pid, &batch)?;
        let tracker = taken.and_then(WriteTracker::enable).map_err(|errno| {
            refuse(pid, "write tracking", format!("asynchronous write-protection failed: {errno}; Linux 6.7 has it, see `snapback check`"))
        })?;
        Ok(Self {
            pid,
            generation: stopped.member(pid)?.generation,
            tracker,
            store: Store::new(store),
            hot: Hot::default(),
        })
    }

    /// Removes what a keeper that was killed has left in the process: its window and its zombie shadows.
    ///
    /// A keeper that lives has its tracking registered, so this refuses before it takes anything away from it.
    fn clear_leftovers(&self, stopped: &mut Stopped) -> Result<()> {
        let pid = self.pid;
        let window = window_span(stopped, pid)?;
        let text = read_maps(stopped.member(pid)?)?;
        let layout = Layout::parse(&text, Some(window)).unwrap_or_default();
        self.register(&layout)?;
        let mut batch = Batch::new();
        let is_window = |vma: &&Vma| vma.shared && &*vma.name == freeze::WINDOW_MAPPING;
        let memory = &stopped.member(pid)?.memory;
        let mut forked = Vec::new();
        for vma in layout.vmas.iter().filter(is_window) {
            batch.call(libc::SYS_munmap, &[vma.start.into(), vma.len().into()]);
            forked.extend(freeze::forked_last(memory, vma.start).filter(|_| vma.offset == 0));
        }
        let mut leftovers = Vec::new();
        let children = stopped.processes().filter(|child| child.parent == pid);
        for child in children.filter(|child| child.is_zombie()) {
            let child = child.pid;
            let status = std::fs::read_to_string(procfs::path(child, "status")).unwrap_or_default();
            let inside = procfs::pid_inside(&status).unwrap_or(child.as_raw());
            let is_shadow = procfs::Stat::read(child).is_ok_and(|stat| {
                stat.exit_signal() == 0 && (stat.session() == child || forked.contains(&inside))
            });
            if is_shadow {
                leftovers.push(child);
                let options = libc::__WALL | libc::WNOHANG;
                batch.call(
                    libc::SYS_wait4,
                    &[inside.into(), 0.into(), options.into(), 0.into()],
                );
            }
        }
        if !batch.is_empty() {
            stopped.run(pid, &batch)?;
        }
        leftovers
            .into_iter()
            .for_each(|shadow| stopped.remove(shadow));
        Ok(())
    }

    /// Whether the process still has this address space, as far as it is known.
    pub fn is_current(&self, member: &freeze::Member) -> bool {
        self.generation == member.generation
    }

    /// Whether an image is of this address space.
    pub fn is_of(&self, image: &SpaceImage) -> bool {
        (self.pid, self.generation) == (image.pid, image.generation)
    }

    /// Where in the window a slot of the store is.
    pub(super) fn slot_offset(slot: u32) -> usize {
        STORE_OFFSET + slot as usize * PAGE as usize
    }

    /// Registers the private VMAs of a layout for tracking, those already registered too.
    pub(super) fn register(&self, layout: &Layout) -> Result<()> {
        for run in layout.private_runs() {
            let (Some(first), Some(last)) = (run.first(), run.last()) else {
                continue;
            };
            // All at once, and if that is refused one by one, for the name of the one it is about.
            if self
                .tracker
                .register(first.start, last.end - first.start)
                .is_err()
            {
                run.iter().try_for_each(|vma| self.register_vma(vma))?;
            }
        }
        Ok(())
    }

    pub(super) fn register_vma(&self, vma: &Vma) -> Result<()> {
        let why = match self.tracker.register(vma.start, vma.len()) {
            Ok(()) => return Ok(()),
            Err(Errno::EBUSY) => {
                "the program tracks it with a userfaultfd of its own; such programs can't be taken"
                    .into()
            }
            Err(errno) => format!(
                "its pages can't be tracked ({errno}): device memory and the like can't be taken"
            ),
        };
        Err(refuse(self.pid, format!("memory {vma:?}"), why))
    }

    /// Arms what is there while the process runs, so that little is left to be armed when it is stopped. What goes wrong
    /// here, as when the memory map changes meanwhile, is left to then.
    pub fn arm_running(&self, tree: &freeze::Tree) {
        let armed = tree.member(self.pid).map(|member| {
            let layout = Layout::parse(&read_maps(member)?, None).unwrap_or_default();
            let mut found = Vec::new();
            layout
                .scan(&member.pagemap, Scan::Rearm, Span::ALL, &mut found)
                .map_err(|errno| system(self.pid, "arm its pages", errno))
        });
        if let Some(Err(error)) = armed {
            tracing::debug!(%error, "not armed before the stop");
        }
    }

    /// Takes an image of the address space of which a shadow was made just now: VMA list, populated pages; and arms the
    /// tracking. On failure the shadow is gone.
    ///
    /// Pages written since it was last armed are added to the stale set of `others`, the images of the same space
    /// in other checkpoints.
    pub fn capture<'i>(
        &mut self,
        stopped: &mut Stopped,
        Fresh {
            shadow,
            brk,
            locks_future,
        }: Fresh,
        others: impl Iterator<Item = &'i mut SpaceImage>,
        context: &mut Context,
    ) -> Result<(SpaceImage, Copied)> {
        let pid = self.pid;
        let of_shadow = shadow.pid;
        let capture = || {
            let generation = stopped.member(pid)?.generation;
            let (header_id, layout, armed, populated) =
                self.finish(stopped, others, context, &shadow, (brk, locks_future))?;
            let mut image = SpaceImage::new(
                header_id,
                pid,
                generation,
                Source::Shadow(shadow),
                layout,
                locks_future,
            );
            super::aio::check(pid, &image.layout)?;
            let saved = self.save_what_the_shadow_lacks(stopped, &mut image, &populated);
            let image = match saved {
                Ok(bytes) => (
                    image,
                    Copied {
                        pages: armed,
                        bytes,
                    },
                ),
                Err(error) => {
                    self.forget(&image);
                    return Err(error);
                }
            };
            Ok(image)
        };
        capture().inspect_err(|_| fork::end(stopped, pid, of_shadow))
    }

    fn finish<'i>(
        &mut self,
        stopped: &mut Stopped,
        others: impl Iterator<Item = &'i mut SpaceImage>,
        context: &mut Context,
        shadow: &Shadow,
        (brk, locks_future): (u64, u64),
    ) -> Result<(crate::record::ObjectId, Layout, u64, Ranges)> {
        let pid = self.pid;
        let member = stopped.member(pid)?;
        let window = window_span(stopped, pid)?;
        let text = read_maps(member)?;
        let layout = parse_map(pid, &text, window)?;
        if let Some(huge) = layout.private().find(|vma| vma.is_of_huge_pages()) {
            // A shadow would use up as many again, and the program be killed for want of one.
            return Err(refuse(
                pid,
                format!("memory {huge:?}"),
                "huge pages of hugetlbfs can't be taken yet; let it use transparent ones",
            ));
        }
        self.register(&layout)?;
        let failed = |errno| system(pid, "scan its pages", errno);
        let mut written = Vec::new();
        layout
            .scan(&member.pagemap, Scan::Rearm, Span::ALL, &mut written)
            .map_err(failed)?;
        self.hot.all_armed();
        let written: Ranges = written.iter().map(Span::from).collect();
        let populated = layout.populated(&member.pagemap).map_err(failed)?;
        for other in others.filter(|image| self.is_of(image)) {
            other.stale = other.stale.union(&written);
        }

        let id = context.new_object();
        let header = AddressSpaceHeader {
            pid: pid.as_raw() as u32,
            shadow: shadow.pid.as_raw() as u32,
            brk,
            window_start: window.start,
            window_end: window.end,
            locks_future,
        };
        context.append(Kind::VmaList, id, &[&text])?;
        context.put_list(Kind::PopulatedRanges, id, populated.spans())?;
        context.put(
            Kind::AddressSpace,
            id,
            &header,
            locks::read(pid)?.as_bytes(),
        )?;
        Ok((id, layout, populated.pages(), populated))
    }

    /// Copies pages that fork does not give to a child (`MADV_DONTFORK`, `MADV_WIPEONFORK`) into the page store.
    fn save_what_the_shadow_lacks(
        &mut self,
        stopped: &mut Stopped,
        image: &mut SpaceImage,
        populated: &Ranges,
    ) -> Result<u64> {
        let pid = self.pid;
        let lacking = lacking(image, populated)?;
        image.pins = pins(image)?;
        let member = stopped.tree_mut().member_mut(pid);
        let member = member.ok_or(freeze::Error::Gone(pid))?;
        let (window, memory) = (member.window.as_mut(), &member.memory);
        let target = window.ok_or(freeze::Error::Gone(pid))?;
        for span in lacking.spans() {
            let mut at = span.start;
            while at < span.end {
                let slot = self.store.take().ok_or_else(|| {
                    refuse(
                        pid,
                        "its MADV_DONTFORK memory",
                        "it holds more of it than the page store has room for",
                    )
                })?;
                let page = target
                    .window
                    .store_mut(Self::slot_offset(slot), PAGE as usize);
                // Not process_vm_readv(2), which obeys PROT_NONE.
                memory
                    .read_exact_at(page, at)
                    .map_err(|error| system(pid, "read a page", error))?;
                image.slots.insert(at, slot);
                at += PAGE;
            }
        }
        image.kept = lacking;
        Ok(image.kept.bytes())
    }

    /// Gives up an image: its shadow and its slots. The process must be stopped for its shadow to be reaped; one
    /// that is gone leaves that to its init.
    pub fn discard(space: Option<&mut Self>, stopped: &mut Stopped, image: SpaceImage) {
        if let Some(shadow) = image.source.shadow() {
            // That of a process which has ended since is another's child.
            let parent = procfs::Stat::read(shadow.pid).map_or(image.pid, |stat| stat.parent());
            shadow.kill();
            fork::reap(stopped, parent, shadow.pid);
            stopped.tree_mut().remove_shadow(shadow.pid);
        }
        if let Some(space) = space {
            space.forget(&image);
        }
    }

    /// Gives back the slots of an image.
    fn forget(&mut self, image: &SpaceImage) {
        image
            .slots
            .values()
            .for_each(|slot| self.store.give_back(*slot));
    }
}

/// The populated pages that fork has not given to the shadow of an image.
///
/// `MADV_DONTFORK` leaves out the VMA, `MADV_WIPEONFORK` all pages of it, as does a VMA that was only read, which has but
/// the zero page: so the first page of each tells of the rest.
fn lacking(image: &SpaceImage, populated: &Ranges) -> Result<Ranges> {
    let shadow = image.shadow()?;
    let in_shadow = vmas_of_shadow(image)?;
    let mut lacking = Ranges::new();
    for vma in image.layout.private() {
        let pages = populated.intersection(&Ranges::from_iter([Span::from(vma)]));
        let Some(first) = pages.spans().first() else {
            continue;
        };
        let has_it = in_shadow.at(first.start).is_some() && {
            let what = Scan::Populated(Backing::Nothing);
            let mut found = Vec::new();
            let end = first.start + PAGE;
            pagemap::scan(&shadow.pagemap, what, first.start, end, &mut found)
                .map_err(|errno| system(shadow.pid, "scan a shadow", errno))?;
            !found.is_empty()
        };
        if !has_it {
            pages.spans().iter().for_each(|span| lacking.push(*span));
        }
    }
    Ok(lacking)
}

/// Pins of the files behind VMAs that fork has not given to the shadow of an image: nothing else may lead there later.
fn pins(image: &SpaceImage) -> Result<BTreeMap<(u64, u64), File>> {
    let pid = image.pid;
    let in_shadow = vmas_of_shadow(image)?;
    let mut pins = BTreeMap::new();
    let files = image
        .layout
        .vmas
        .iter()
        .filter(|vma| !vma.is_anonymous() && !vma.is_special());
    for vma in files.filter(|vma| in_shadow.at(vma.start).is_none()) {
        let name = format!("map_files/{:x}-{:x}", vma.start, vma.end);
        let pin = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(procfs::path(pid, &name))
            .map_err(|error| system(pid, &format!("pin the file mapped at {vma:?}"), error))?;
        pins.insert((vma.device, vma.inode), pin);
    }
    Ok(pins)
}

fn vmas_of_shadow(image: &SpaceImage) -> Result<Layout> {
    let shadow = image.shadow()?.pid;
    let text = std::fs::read(procfs::path(shadow, "maps"))
        .map_err(|error| system(shadow, "read the memory map of a shadow", error))?;
    Ok(Layout::parse(&text, None).unwrap_or_default())
}

/// Where the window of a process is in its address space.
pub(super) fn window_span(stopped: &Stopped, pid: Pid) -> Result<Span> {
    let window = stopped
        .member(pid)?
        .window
        .as_ref()
        .ok_or(freeze::Error::Gone(pid))?;
    Ok(Span {
        start: window.address,
        end: window.end(),
    })
}

/// The text of the maps file of the address space a member had when it became known. Empty: it has another one now.
pub(super) fn read_maps(member: &freeze::Member) -> Result<Vec<u8>> {
    procfs::read_held(&member.maps)
        .map_err(|error| system(member.pid, "read its memory map", error))
}

/// The VMAs in that text, without the window.
pub(super) fn parse_map(pid: Pid, text: &[u8], window: Span) -> Result<Layout> {
    Layout::parse(text, Some(window)).ok_or_else(|| {
        refuse(
            pid,
            "its memory map",
            "/proc/PID/maps does not read as documented",
        )
    })
}

/// Gives `each` what regions cover of the private VMAs of a layout, in order.
pub(super) fn for_each_part(
    layout: &Layout,
    regions: &[Region],
    mut each: impl FnMut(&Vma, Span, Categories),
) {
    let mut vmas = layout.private().peekable();
    for region in regions {
        let mut at = region.start;
        while at < region.end {
            while vmas.next_if(|vma| vma.end <= at).is_some() {}
            let Some(vma) = vmas.peek().filter(|vma| vma.start < region.end) else {
                break;
            };
            let span = Span {
                start: at.max(vma.start),
                end: region.end.min(vma.end),
            };
            each(vma, span, region.categories);
            at = span.end;
        }
    }
}

pub(super) fn system(pid: Pid, what: &str, error: impl Into<std::io::Error>) -> super::Error {
    freeze::Error::System {
        what: format!("{what} (pid {pid})"),
        error: error.into(),
    }
    .into()
}

pub(super) fn refuse(
    pid: Pid,
    object: impl Into<String>,
    remedy: impl Into<String>,
) -> super::Error {
    let holder = format!("pid {pid} ({})", procfs::comm(pid));
    Refusal {
        object: object.into(),
        holder,
        remedy: remedy.into(),
    }
    .into()
}
