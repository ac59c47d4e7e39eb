//! Capturing an address space, and what is kept of it as long as any checkpoint of it lives.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::Pid;
use zerocopy::IntoBytes;

use crate::freeze::{self, Batch, STORE_OFFSET, Stopped};
use crate::kernel::maps::Vma;
use crate::kernel::pagemap::{self, Backing, Categories, Region, Scan};
use crate::kernel::userfaultfd::{USER_MODE_ONLY, WriteTracker};
use crate::kernel::{pidfd, procfs};
use crate::outcome::Refusal;
use crate::record::{Context, Kind, ObjectId};

use super::fork::{self, Fresh};
use super::history::{History, State};
use super::hot::Hot;
use super::image::{AddressSpaceHeader, SpaceImage};
use super::increment::{Changes, Foothold};
use super::layout::Layout;
use super::locks;
use super::page_map::PageMap;
use super::page_store::PageStore;
use super::plan::Plan;
use super::ranges::{Ranges, Span};
use super::source::{Base, Resident, Source};
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
    /// tracking. On failure the shadow is gone. `before` tells how it differs from what it was equal to last, `called` is what
    /// records call the process, `standing` what the shadow has of it.
    pub fn capture(
        &mut self,
        stopped: &mut Stopped,
        Fresh {
            shadow,
            brk,
            locks_future,
        }: Fresh,
        before: Option<Changes>,
        (called, standing): (Pid, Vec<u8>),
        context: &mut Context,
    ) -> Result<(SpaceImage, Copied)> {
        let of_shadow = shadow.pid;
        let base = Arc::new(Base::new(shadow, standing));
        let captured = self.capture_whole(
            stopped,
            base,
            (brk, locks_future),
            (called, before),
            context,
        );
        captured.inspect_err(|_| fork::end(stopped, self.pid, of_shadow))
    }

    fn capture_whole(
        &mut self,
        stopped: &mut Stopped,
        base: Arc<Base>,
        asked: (u64, u64),
        (called, before): (Pid, Option<Changes>),
        context: &mut Context,
    ) -> Result<(SpaceImage, Copied)> {
        let pid = self.pid;
        let member = stopped.member(pid)?;
        let generation = member.generation;
        let window = window_span(stopped, pid)?;
        let text = read_maps(member)?;
        let layout = parse_map(pid, &text, window)?;
        check_layout(pid, &layout)?;
        self.register(&layout)?;
        let failed = |errno| system(pid, "scan its pages", errno);
        let mut written = Vec::new();
        layout
            .scan(&member.pagemap, Scan::Rearm, Span::ALL, &mut written)
            .map_err(failed)?;
        self.hot.all_armed();
        let written: Ranges = written.iter().map(Span::from).collect();
        let populated = layout.populated(&member.pagemap).map_err(failed)?;
        let differing = before.map(|before| before.differing(&written));
        self.history.armed(&written);

        let named = (pid, called);
        let id = append(context, named, &base, (&text, window), &populated, asked)?;
        super::aio::check(pid, &layout)?;
        let mut pages = PageMap::new(self.pages.clone());
        let lacking = lacking(&base, &layout, &populated)?;
        self.copy_out(stopped, &lacking, &mut pages)?;
        let pins = pins(pid, &base, &layout, &BTreeMap::new())?;
        self.taken = Some(Taken {
            state: State {
                base: base.id,
                pages: pages.clone(),
                populated: populated.clone(),
                layout: layout.clone(),
            },
            differing,
            is_increment: false,
            besides: Ranges::new(),
        });
        let source = Source::Resident(Resident {
            base,
            pages,
            described: None,
        });
        let mut image = SpaceImage::new(id, pid, generation, source, layout, asked.1);
        image.pins = pins;
        let armed = Copied {
            pages: populated.pages(),
            bytes: lacking.bytes(),
        };
        Ok((image, armed))
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

/// Writes the records of an image of a process, which they call by the second of the numbers.
pub(super) fn append(
    context: &mut Context,
    (pid, called): (Pid, Pid),
    base: &Base,
    (text, window): (&[u8], Span),
    populated: &Ranges,
    (brk, locks_future): (u64, u64),
) -> Result<ObjectId> {
    let id = context.new_object();
    let header = AddressSpaceHeader {
        pid: called.as_raw() as u32,
        shadow: base.shadow.pid.as_raw() as u32,
        brk,
        window_start: window.start,
        window_end: window.end,
        locks_future,
    };
    context.append(Kind::VmaList, id, &[text])?;
    context.put_list(Kind::PopulatedRanges, id, populated.spans())?;
    context.put(
        Kind::AddressSpace,
        id,
        &header,
        locks::read(pid)?.as_bytes(),
    )?;
    Ok(id)
}

/// The populated pages that fork has not given to a shadow.
///
/// `MADV_DONTFORK` leaves out the VMA, `MADV_WIPEONFORK` all pages of it, as does a VMA that was only read, which has but
/// the zero page: so the first page of each tells of the rest.
fn lacking(base: &Base, layout: &Layout, populated: &Ranges) -> Result<Ranges> {
    let shadow = &base.shadow;
    let in_shadow = base.vmas()?;
    let mut lacking = Ranges::new();
    for vma in layout.private() {
        let pages = populated.intersection(&Ranges::from_iter([Span::from(vma)]));
        let Some(first) = pages.spans().first() else {
            continue;
        };
        let is_there = |vma: &Vma| vma.start <= first.start && first.start < vma.end;
        let has_it = in_shadow.iter().any(is_there) && {
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

/// Pins of the files that are mapped and not in a shadow: nothing else may lead there later. Those that are pinned already
/// stay so.
pub(super) fn pins(
    pid: Pid,
    base: &Base,
    layout: &Layout,
    before: &BTreeMap<(u64, u64), Arc<File>>,
) -> Result<BTreeMap<(u64, u64), Arc<File>>> {
    let in_shadow: BTreeSet<(u64, u64)> = base.vmas()?.iter().map(inode).collect();
    let mut pins = BTreeMap::new();
    let files = layout
        .vmas
        .iter()
        .filter(|vma| !vma.is_anonymous() && !vma.is_special());
    for vma in files.filter(|vma| !in_shadow.contains(&inode(vma))) {
        if pins.contains_key(&inode(vma)) {
            continue;
        }
        let name = format!("map_files/{:x}-{:x}", vma.start, vma.end);
        let pin = match before.get(&inode(vma)) {
            Some(pin) => Arc::clone(pin),
            None => OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_PATH)
                .open(procfs::path(pid, &name))
                .map(Arc::new)
                .map_err(|error| system(pid, &format!("pin the file mapped at {vma:?}"), error))?,
        };
        pins.insert(inode(vma), pin);
    }
    Ok(pins)
}

fn inode(vma: &Vma) -> (u64, u64) {
    (vma.device, vma.inode)
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
