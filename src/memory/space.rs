//! Capturing an address space, and what is kept of it as long as any checkpoint of it lives.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::freeze::{self, Batch, STORE_OFFSET, Stopped};
use crate::kernel::maps::Vma;
use crate::kernel::pagemap::{Categories, Region, Scan};
use crate::kernel::userfaultfd::{USER_MODE_ONLY, WriteTracker};
use crate::kernel::{pidfd, procfs};
use crate::outcome::Refusal;
use crate::record::Context;

use super::fork::{self};
use super::history::{History, State};
use super::hot::Hot;
use super::image::SpaceImage;
use super::increment::Foothold;
use super::layout::Layout;
use super::page_store::PageStore;
use super::plan::Plan;
use super::ranges::{Ranges, Span};
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
    /// What it has been, as far as checkpoints have it.
    pub(super) history: History,
    /// Where pages are kept by copy.
    pub(super) pages: PageStore,
    /// What the next increment begins with.
    pub(super) foothold: Foothold,
    /// What a checkpoint that is being taken has of it.
    pub(super) taken: Option<Taken>,
}

/// What a checkpoint has of an address space, before it is known whether it comes about.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) state: State,
    /// Pages in which it may differ from the state before, if it has a shadow of its own. `None`: any may.
    pub(super) differing: Option<Ranges>,
    /// It has the shadow of the state before.
    pub(super) is_increment: bool,
    /// Pages that were armed and are not in the state.
    pub(super) besides: Ranges,
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
        let made = stopped.open_window(pid, store)?;
        let space = Self::track(stopped, pid, store, made)?;
        space.clear_leftovers(stopped)?;
        Ok(space)
    }

    /// Makes the write tracker of a process that has a window with a page store of `store` bytes. `made`: the userfaultfd
    /// that was made with the window.
    pub(super) fn track(
        stopped: &mut Stopped,
        pid: Pid,
        store: usize,
        made: Option<freeze::Made>,
    ) -> Result<Self> {
        let made = match made {
            Some(made) => made,
            None => make_userfaultfd(stopped, pid)?,
        };
        let failed = |what: &str| {
            refuse(
                pid,
                "write tracking",
                format!("{what}; see `snapback check`"),
            )
        };
        let fd = made.map_err(|errno| failed(&format!("userfaultfd(2) failed: {errno}")))?;
        let tracker = WriteTracker::enable(fd).map_err(|errno| {
            failed(&format!(
                "asynchronous write-protection, of Linux 6.7, failed: {errno}"
            ))
        })?;
        Ok(Self {
            pid,
            generation: stopped.member(pid)?.generation,
            tracker,
            store: Store::new(store),
            hot: Hot::default(),
            history: History::default(),
            pages: PageStore::default(),
            foothold: Foothold::default(),
            taken: None,
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

    /// Whether a checkpoint of it was taken before.
    pub fn is_known(&self) -> bool {
        self.history.now().is_some()
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

    /// The checkpoint that was being taken has come about, with this image, or it has not.
    pub fn conclude(&mut self, image: Option<&SpaceImage>) {
        let (Some(taken), Some(image)) = (self.taken.take(), image) else {
            return;
        };
        self.foothold = Foothold::on(image);
        match (taken.is_increment, taken.differing) {
            (true, _) => self.history.settle(taken.state),
            (false, Some(differing)) => self.history.rebase(taken.state, &differing),
            (false, None) => {
                self.history = History::default();
                self.history.settle(taken.state);
            }
        }
        self.history.armed(&taken.besides);
    }

    /// It is equal to an image.
    pub fn settle(&mut self, image: &SpaceImage, context: &Context) -> Result<()> {
        let resident = image.source.resident(image.pid)?;
        self.foothold = Foothold::on(image);
        self.history.settle(State {
            base: resident.base.id,
            pages: resident.pages.clone(),
            populated: image.populated(context)?,
            layout: image.layout.clone(),
        });
        Ok(())
    }

    /// Pages in which it may differ from an image though they were not written since the tracking was last armed.
    pub fn stale(&self, image: &SpaceImage, populated: &Ranges) -> Ranges {
        let of_image = image.source.in_ram().filter(|_| self.is_of(image));
        let differing = of_image.and_then(|resident| {
            self.history
                .differing(resident.base.id, &resident.pages, populated)
        });
        differing.unwrap_or_else(|| image.layout.private().map(Span::from).collect())
    }

    /// Gives up an image: what only it has, and its shadow, unless others have it too (`is_shared`). The process must be
    /// stopped for the shadow to be reaped; one that is gone leaves that to its init.
    pub fn discard(
        space: Option<&mut Self>,
        stopped: Option<&mut Stopped>,
        image: SpaceImage,
        is_shared: bool,
    ) {
        let resident = image.source.in_ram();
        let base = resident.map(|resident| resident.base.id);
        let shadow = image.source.shadow().filter(|_| !is_shared);
        if let (Some(shadow), Some(stopped)) = (shadow, stopped) {
            // That of a process which has ended since is another's child.
            let parent = procfs::Stat::read(shadow.pid).map_or(image.pid, |stat| stat.parent());
            shadow.kill();
            fork::reap(stopped, parent, shadow.pid);
            stopped.tree_mut().remove_shadow(shadow.pid);
        }
        let Some(space) = space else {
            return;
        };
        if !is_shared && let Some(base) = base {
            space.history.forget_base(base);
        }
        let mut image = image;
        if space.is_of(&image) {
            space.empty_cache(&mut image);
        }
        drop(image);
        space.history.forget_pages();
    }

    /// Gives back what the store of the window has of an image.
    pub fn empty_cache(&mut self, image: &mut SpaceImage) {
        std::mem::take(&mut image.slots)
            .into_values()
            .for_each(|slot| self.store.give_back(slot));
    }

    /// Whether the store of the window has room for all that is to be copied.
    pub fn has_room(&self, plan: &Plan) -> bool {
        self.store.room() >= plan.copy.pages()
    }

    /// Where pages are kept by copy.
    pub fn page_store(&self) -> &PageStore {
        &self.pages
    }
}

/// Has a process that has a window make a userfaultfd of its address space.
fn make_userfaultfd(stopped: &mut Stopped, pid: Pid) -> Result<freeze::Made> {
    let mut batch = Batch::new();
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
    let made = batch.call(libc::SYS_userfaultfd, &[flags.into()]);
    let outputs = stopped.run(pid, &batch)?;
    let remote = match outputs.result(made) {
        Ok(remote) => remote,
        Err(errno) => return Ok(Err(errno)),
    };
    let taken = pidfd::get_fd(stopped.member(pid)?.pidfd.as_fd(), remote as i32);
    let mut batch = Batch::new();
    batch.call(libc::SYS_close, &[remote.into()]);
    stopped.run(pid, &batch)?;
    Ok(taken)
}

/// Refuses what can't be kept.
pub(super) fn check_layout(pid: Pid, layout: &Layout) -> Result<()> {
    match layout.private().find(|vma| vma.is_of_huge_pages()) {
        // A shadow would use up as many again, and the program be killed for want of one.
        Some(huge) => Err(refuse(
            pid,
            format!("memory {huge:?}"),
            "huge pages of hugetlbfs can't be taken yet; let it use transparent ones",
        )),
        None => Ok(()),
    }
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
