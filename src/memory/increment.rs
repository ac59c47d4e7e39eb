//! Images that have their shadow from a checkpoint before: what was written since is copied, and what else may have changed
//! is noted.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Weak};

use nix::unistd::Pid;

use crate::fault;
use crate::freeze::{Batch, StepId, Stopped};
use crate::kernel::pagemap::{Categories, Scan};
use crate::kernel::{procfs, remote_memory};
use crate::record::Context;

use super::capture::{append, pins};
use super::execute::blocks;
use super::flags;
use super::history::State;
use super::image::SpaceImage;
use super::layout::Layout;
use super::locks::{self, LOCKED, ON_FAULT};
use super::observe::Observed;
use super::page_map::PageMap;
use super::plan;
use super::ranges::{Ranges, Span};
use super::source::{Base, Described, Resident, Source};
use super::space::{Copied, Space, Taken, check_layout, parse_map, read_maps, system, window_span};
use super::{PAGE, Result};

/// An image never has less than these pages by copy that a shadow of its own would spare it: 16 MiB.
const LEAST: u64 = 4096;
/// Copying a page takes this many times as long as a shadow takes for one that it keeps.
const COPY_TO_FORK: u64 = 8;

/// What an image that becomes the state of an address space leaves for the next one.
#[derive(Debug, Default)]
pub(super) struct Foothold {
    base: Weak<Base>,
    pins: BTreeMap<(u64, u64), Weak<File>>,
}

impl Foothold {
    pub(super) fn on(image: &SpaceImage) -> Self {
        let base = image.source.in_ram().map(|resident| &resident.base);
        Self {
            base: base.map_or_else(Weak::new, Arc::downgrade),
            pins: image
                .pins
                .iter()
                .map(|(inode, pin)| (*inode, Arc::downgrade(pin)))
                .collect(),
        }
    }

    fn pins(&self) -> BTreeMap<(u64, u64), Arc<File>> {
        let pins = self.pins.iter();
        pins.filter_map(|(inode, pin)| Some((*inode, pin.upgrade()?)))
            .collect()
    }
}

/// How an address space differs from what it was equal to last.
#[derive(Debug)]
pub struct Changes {
    base: Arc<Base>,
    /// What is kept by copy of the state before.
    pages: PageMap,
    text: Vec<u8>,
    layout: Layout,
    populated: Ranges,
    guards: Ranges,
    /// Pages that are there and may be others than before.
    changed: Ranges,
    /// Pages that were there, or may have been, and are not.
    gone: Ranges,
    /// Pages that are not armed.
    unarmed: Ranges,
    must_register: bool,
}

impl Changes {
    /// Whether a shadow of its own makes a better image: so much is to be copied that it is faster, or so much is kept by copy
    /// that the shadow before has little to share.
    pub fn want_shadow(&self) -> bool {
        let (changed, all) = (self.changed.pages(), self.populated.pages());
        let copies = changed + self.pages.len();
        (changed > LEAST && changed * COPY_TO_FORK > all) || (copies > LEAST && copies * 2 > all)
    }

    /// Number of pages that are there.
    pub fn resident(&self) -> u64 {
        self.populated.pages()
    }

    /// Pages in which it may differ from the state before; `written` were found later.
    pub(super) fn differing(&self, written: &Ranges) -> Ranges {
        self.changed.union(&self.gone).union(written)
    }
}

/// Questions to a process of which an increment is to be taken.
#[derive(Debug)]
pub struct Inquiry {
    brk: StepId,
    future: locks::Question,
}

/// Its answers.
#[derive(Debug)]
pub struct Answers {
    brk: u64,
    locks_future: u64,
}

impl Inquiry {
    /// Has a process asked; until [`Inquiry::finish`] nothing may be done to its leader.
    ///
    /// # Errors
    ///
    /// The process has died.
    pub fn start(stopped: &mut Stopped, pid: Pid) -> Result<Self> {
        let mut batch = Batch::new();
        let brk = batch.call(libc::SYS_brk, &[0.into()]);
        let future = locks::Question::add(&mut batch);
        stopped.start(pid, &batch)?;
        Ok(Self { brk, future })
    }

    /// What it has answered.
    ///
    /// # Errors
    ///
    /// The process has died.
    pub fn finish(self, stopped: &mut Stopped, pid: Pid) -> Result<Answers> {
        let outputs = stopped.finish(pid)?;
        Ok(Answers {
            brk: outputs.result(self.brk).unwrap_or(0),
            locks_future: self.future.read(&outputs),
        })
    }
}

impl Space {
    /// How it differs from what it was equal to last, if an increment can tell: if that has a shadow still, of a process that
    /// was of the same `standing` and ran the same program.
    ///
    /// # Errors
    ///
    /// It can't be looked at, or holds what can't be kept.
    pub fn changes(&self, stopped: &Stopped, standing: &[u8]) -> Result<Option<Changes>> {
        let pid = self.pid;
        let member = stopped.member(pid)?;
        let (Some(now), Some(base)) = (self.history.now(), self.foothold.base.upgrade()) else {
            return Ok(None);
        };
        let program = |pid| {
            let metadata = std::fs::metadata(procfs::path(pid, "exe")).ok()?;
            Some((metadata.dev(), metadata.ino()))
        };
        let fits = base.id == now.base
            && base.standing == standing
            && self.is_current(member)
            && base.shadow.is_alive()
            && program(pid).is_some_and(|is| program(base.shadow.pid) == Some(is));
        if !fits {
            return Ok(None);
        }
        let text = read_maps(member)?;
        let layout = parse_map(pid, &text, window_span(stopped, pid)?)?;
        check_layout(pid, &layout)?;
        self.compare(stopped, now, base, text, layout).map(Some)
    }

    fn compare(
        &self,
        stopped: &Stopped,
        now: &State,
        base: Arc<Base>,
        text: Vec<u8>,
        layout: Layout,
    ) -> Result<Changes> {
        let stale = self.history.stale();
        let known = now.populated.union(&stale);
        let observed = Observed::look_at_pages(stopped, self.pid, &layout, &known)?;
        let seen = plan::sort(&layout, &observed);
        let replaced = plan::replaced(&layout.changes_from(&now.layout));
        let populated = seen.populated(&layout);
        let changed = seen
            .suspect_in(&layout)
            .union(&replaced)
            .union(&stale)
            .union(&populated.difference(&now.populated))
            .intersection(&populated);
        let unarmed = observed.suspect.iter();
        let unarmed = unarmed
            .filter(|region| region.categories.has(Categories::PRESENT))
            .map(Span::from);
        Ok(Changes {
            base,
            pages: now.pages.clone(),
            guards: seen.guards,
            gone: known.difference(&populated),
            unarmed: unarmed.collect(),
            must_register: !seen.unregistered.is_empty() || layout != now.layout,
            changed,
            populated,
            text,
            layout,
        })
    }

    /// Takes an image by copying what has changed, and arms the tracking.
    ///
    /// # Errors
    ///
    /// Refused, or it failed; nothing is left of it.
    pub fn capture_increment(
        &mut self,
        stopped: &mut Stopped,
        changes: Changes,
        Answers { brk, locks_future }: Answers,
        context: &mut Context,
    ) -> Result<(SpaceImage, Copied)> {
        let pid = self.pid;
        let Changes {
            base,
            mut pages,
            text,
            layout,
            populated,
            guards,
            changed,
            gone,
            unarmed,
            must_register,
        } = changes;
        super::aio::check(pid, &layout)?;
        if must_register {
            self.register(&layout)?;
        }
        let member = stopped.member(pid)?;
        let generation = member.generation;
        let mut written = Vec::new();
        for block in blocks(&unarmed).spans() {
            layout
                .scan(&member.pagemap, Scan::Rearm, *block, &mut written)
                .map_err(|errno| system(pid, "arm its pages", errno))?;
        }
        self.hot.all_armed();
        let written: Ranges = written.iter().map(Span::from).collect();
        self.history.armed(&written);
        fault::point("increment.armed");
        // What ran in it since it was looked at may have written to it.
        let changed = changed.union(&written.intersection(&populated));
        pages.clear(&gone);
        self.copy_out(stopped, &changed, &mut pages)?;
        fault::point("increment.copied");
        let described = describe(stopped, pid, guards)?;
        let pins = pins(pid, &base, &layout, &self.foothold.pins())?;
        let window = window_span(stopped, pid)?;
        let asked = (brk, locks_future);
        let id = append(context, pid, &base, (&text, window), &populated, asked)?;
        let anonymous = layout.private().filter(|vma| vma.is_anonymous());
        let besides = written
            .intersection(&anonymous.map(Span::from).collect())
            .difference(&populated);
        self.taken = Some(Taken {
            state: State {
                base: base.id,
                pages: pages.clone(),
                populated,
                layout: layout.clone(),
            },
            differing: None,
            is_increment: true,
            besides,
        });
        let source = Source::Resident(Resident {
            base,
            pages,
            described: Some(described),
        });
        let mut image = SpaceImage::new(id, pid, generation, source, layout, locks_future);
        image.pins = pins;
        let copied = Copied {
            pages: changed.pages(),
            bytes: changed.bytes(),
        };
        Ok((image, copied))
    }

    /// Copies pages of the stopped process into the store.
    pub(super) fn copy_out(
        &self,
        stopped: &Stopped,
        pages: &Ranges,
        map: &mut PageMap,
    ) -> Result<()> {
        let pid = self.pid;
        let memory = &stopped.member(pid)?.memory;
        let store = map.store().clone();
        let runs = store
            .take(pages.pages() as u32)
            .map_err(|error| system(pid, "make room for its pages", error))?;
        let mut left = pages.pieces(PAGE);
        let mut all = Vec::with_capacity(runs.len());
        // From here on they are the map's, whatever goes wrong.
        for (first, len) in runs {
            let of_run: Ranges = left
                .by_ref()
                .take(len as usize)
                .zip(first..)
                .map(|(page, slot)| {
                    map.set(page.start, slot);
                    page
                })
                .collect();
            all.push(((first, len), of_run));
        }
        for (run, pages) in all {
            store
                .fill(run, |bytes| read(pid, memory, &pages, bytes))
                .map_err(|error| system(pid, "copy its pages", error))?;
        }
        Ok(())
    }
}

/// Reads pages of a process one after the other, be it that itself may not.
fn read(pid: Pid, memory: &File, pages: &Ranges, bytes: &mut [u8]) -> std::io::Result<()> {
    let ranges: Vec<_> = pages
        .spans()
        .iter()
        .map(|span| remote_memory::Range {
            start: span.start,
            len: span.len() as usize,
        })
        .collect();
    if remote_memory::read(pid, &ranges, bytes).is_ok() {
        return Ok(());
    }
    let mut rest = bytes;
    for range in ranges {
        let (part, after) = rest.split_at_mut(range.len);
        memory.read_exact_at(part, range.start)?;
        rest = after;
    }
    Ok(())
}

/// What a shadow would tell of the process otherwise.
fn describe(stopped: &Stopped, pid: Pid, guards: Ranges) -> Result<Described> {
    let failed = |error| system(pid, "read what is known of its memory", error);
    let flags = flags::read(pid)?.into_iter();
    Ok(Described {
        // Locks are in a record.
        flags: flags
            .map(|flags| flags.without(&[LOCKED, ON_FAULT]))
            .collect(),
        guards,
        bounds: procfs::Stat::read_held(&stopped.member(pid)?.stat)
            .map_err(failed)?
            .bounds(),
        auxv: std::fs::read(procfs::path(pid, "auxv")).map_err(failed)?,
    })
}
