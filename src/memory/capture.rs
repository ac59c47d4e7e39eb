//! Taking an image of an address space with a shadow of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use nix::unistd::Pid;
use zerocopy::IntoBytes;

use crate::freeze::Stopped;
use crate::kernel::maps::Vma;
use crate::kernel::pagemap::{self, Backing, Scan};
use crate::kernel::procfs;
use crate::record::{Context, Kind, ObjectId};

use super::fork::{self, Fresh};
use super::history::State;
use super::image::{AddressSpaceHeader, SpaceImage};
use super::increment::Changes;
use super::layout::Layout;
use super::locks;
use super::page_map::PageMap;
use super::ranges::{Ranges, Span};
use super::source::{Base, Resident, Source};
use super::space::{Copied, Space, Taken, check_layout, parse_map, read_maps, system, window_span};
use super::{PAGE, Result};

/// An address space that was just armed.
struct Armed {
    generation: u64,
    window: Span,
    text: Vec<u8>,
    layout: Layout,
    populated: Ranges,
    /// Pages in which it may differ from what it was equal to last, if that is known.
    differing: Option<Ranges>,
}

impl Space {
    /// Takes an image of the address space of which a child was forked just now that is becoming its shadow: VMA list,
    /// populated pages; and arms the tracking. On failure the child is gone. `before` tells how it differs from what it was
    /// equal to last, `standing` of the process what the shadow has of it.
    pub fn capture(
        &mut self,
        stopped: &mut Stopped,
        fresh: Fresh,
        before: Option<Changes>,
        standing: Vec<u8>,
        context: &mut Context,
    ) -> Result<(SpaceImage, Copied)> {
        let asked = (fresh.brk, fresh.locks_future);
        let armed = match self.arm(stopped, before) {
            Ok(armed) => armed,
            Err(error) => {
                fresh.discard(stopped);
                return Err(error);
            }
        };
        let shadow = fresh.finish(stopped)?;
        let of_shadow = shadow.pid;
        let base = Arc::new(Base::new(shadow, standing));
        let captured = self.capture_armed(stopped, base, asked, armed, context);
        captured.inspect_err(|_| fork::end(stopped, self.pid, of_shadow))
    }

    /// Arms the tracking of all there is.
    fn arm(&mut self, stopped: &Stopped, before: Option<Changes>) -> Result<Armed> {
        let pid = self.pid;
        let member = stopped.member(pid)?;
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
        Ok(Armed {
            generation: member.generation,
            window,
            text,
            layout,
            populated,
            differing,
        })
    }

    fn capture_armed(
        &mut self,
        stopped: &mut Stopped,
        base: Arc<Base>,
        asked: (u64, u64),
        armed: Armed,
        context: &mut Context,
    ) -> Result<(SpaceImage, Copied)> {
        let pid = self.pid;
        let Armed {
            generation,
            window,
            text,
            layout,
            populated,
            differing,
        } = armed;
        let id = append(context, pid, &base, (&text, window), &populated, asked)?;
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
}

/// Writes the records of an image.
pub(super) fn append(
    context: &mut Context,
    pid: Pid,
    base: &Base,
    (text, window): (&[u8], Span),
    populated: &Ranges,
    (brk, locks_future): (u64, u64),
) -> Result<ObjectId> {
    let id = context.new_object();
    let header = AddressSpaceHeader {
        pid: pid.as_raw() as u32,
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
