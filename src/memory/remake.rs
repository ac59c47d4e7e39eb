//! The address space of a process that is made again: a copy of its parent's, which becomes what the image says.
//!
//! All is planned and done as in any other rollback, of an address space of which nothing is as recorded. What is more:
//! the window is opened where the recorded one was, the kernel's own mappings are moved, and the kernel is told where the
//! program's parts are.

use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::errno::Errno;
use nix::unistd::Pid;
use zerocopy::IntoBytes;

use crate::freeze::{self, Batch, STORE_OFFSET, Stopped};
use crate::kernel::maps::Vma;
use crate::kernel::program_map::{PR_SET_MM_MAP, ProgramMap};
use crate::kernel::{pagemap, procfs};
use crate::record::Context;

use super::image::SpaceImage;
use super::layout::Layout;
use super::observe::{Observed, check_shadow};
use super::plan::{Plan, Recorded, plan};
use super::ranges::{Ranges, Span};
use super::source::Source;
use super::space::{Space, parse_map, read_maps, system, window_span};
use super::{PAGE, Result};

/// Why the address space of an image can't be made again from a copy of its parent's, if it can't. Refuses if the shadow of
/// the image is gone.
pub fn obstacle(image: &SpaceImage, maker: &SpaceImage) -> Result<Option<&'static str>> {
    check_shadow(image)?;
    if super::aio::any(&image.layout) {
        return Ok(Some(
            "it had an AIO context (io_setup), which only itself could make",
        ));
    }
    if offset(&specials(&image.layout), &specials(&maker.layout)).is_none() {
        return Ok(Some(
            "the kernel's own mappings in it are not like its parent's",
        ));
    }
    Ok(None)
}

/// Whether the programs that two images have run are the same file.
pub fn same_program(one: &SpaceImage, other: &SpaceImage) -> bool {
    let program = one.source.program_inode();
    program.is_some() && program == other.source.program_inode()
}

/// Whether a process runs the program of a source.
fn runs(pid: Pid, source: &Source) -> bool {
    let metadata = std::fs::metadata(procfs::path(pid, "exe")).ok();
    let runs = metadata.map(|metadata| (metadata.dev(), metadata.ino()));
    runs.is_some() && runs == source.program_inode()
}

/// Has a process that was made again execute the program of the image, where it may not pass for it otherwise. It has
/// another address space then, no window, and of its descriptors those below `kept`.
pub fn execute_program(
    stopped: &mut Stopped,
    pid: Pid,
    image: &SpaceImage,
    kept: u32,
) -> Result<()> {
    stopped.open_window(pid, PAGE as usize)?;
    let mut batch = Batch::new();
    let close = batch.call(
        libc::SYS_close_range,
        &[kept.into(), u32::MAX.into(), 0.into()],
    );
    let closed = stopped.run(pid, &batch)?;
    closed
        .result(close)
        .map_err(|errno| system(pid, "close its descriptors", errno))?;
    let number = pass_program(stopped, pid, &image.source)?;
    Ok(stopped.execute_program(pid, number)?)
}

/// Gives a process a descriptor, close-on-exec, of the program of a source, and returns its number.
fn pass_program(stopped: &mut Stopped, pid: Pid, source: &Source) -> Result<i32> {
    Ok(stopped.pass_descriptor(pid, source.program()?.as_fd())?)
}

/// The kernel's own mappings that each address space has at a place of its own.
fn specials(layout: &Layout) -> Vec<&Vma> {
    let all = layout.vmas.iter();
    all.filter(|vma| vma.is_special() && &*vma.name != b"[vsyscall]")
        .collect()
}

/// How far the kernel's own mappings are to be moved; `None`: they are not the same ones.
fn offset(to: &[&Vma], from: &[&Vma]) -> Option<u64> {
    let (first, was) = (to.first()?.start, from.first()?.start);
    let offset = first.wrapping_sub(was);
    let alike = |(to, from): (&&Vma, &&Vma)| {
        to.name == from.name
            && to.len() == from.len()
            && to.start == from.start.wrapping_add(offset)
    };
    (to.len() == from.len() && to.iter().zip(from).all(alike)).then_some(offset)
}

impl Space {
    /// Opens the window into a process that was made again, and makes its write tracker. The window is where that of the
    /// image is.
    pub fn reopen(
        stopped: &mut Stopped,
        pid: Pid,
        image: &SpaceImage,
        context: &Context,
    ) -> Result<Self> {
        let header = image.header(context)?;
        let window = Span {
            start: header.window_start,
            end: header.window_end,
        };
        let store = window.len() as usize - STORE_OFFSET;
        let live = Layout::parse(&read_maps(stopped.member(pid)?)?, None).unwrap_or_default();
        let in_the_way = |vma: &&Vma| vma.start < window.end && vma.end > window.start;
        if specials(&live).iter().any(in_the_way) {
            return Err(system(pid, "open its window", Errno::EEXIST));
        }
        let made = stopped.open_window_at(pid, store, Some(window.start))?;
        Self::track(stopped, pid, store, made)
    }

    /// Plans what makes the address space of a process that was made again equal to the image.
    pub fn plan_remake(
        &self,
        stopped: &mut Stopped,
        image: &SpaceImage,
        context: &Context,
    ) -> Result<Plan> {
        self.move_specials(stopped, image)?;
        let pid = self.pid;
        let live = self.live(stopped)?;
        let populated = image.populated(context)?;
        let mut observed = Observed::look(stopped, image, Some(live), &populated)?;
        // The kernel is told of it with all the rest.
        observed.brk = Some(image.header(context)?.brk);
        let recorded = Recorded {
            header: image.header(context)?,
            layout: &image.layout,
            populated: &populated,
            guards: image.guards()?,
            stale: &Ranges::new(),
        };
        let plan = plan(recorded, &observed).map_err(|refusal| {
            let what = format!("plan its memory: {refusal}");
            system(pid, &what, Errno::EINVAL)
        })?;
        Ok(Plan {
            remade: true,
            ..plan
        })
    }

    /// Takes pages out of what is to be copied that need not be: the process has the very same from its parent as the shadow,
    /// which tells by their frames. To be called when the VMAs are as in the image.
    pub fn keep_inherited(
        &self,
        stopped: &Stopped,
        image: &SpaceImage,
        plan: &mut Plan,
    ) -> Result<()> {
        /// Of the pages looked at in one go.
        const PIECE: u64 = 4 << 20;
        let (live, shadow) = (&stopped.member(self.pid)?.pagemap, &image.shadow()?.pagemap);
        let mut same = Ranges::new();
        for span in plan.copy.pieces(PIECE) {
            // A page that the kernel moves leaves its frame to another, which might be the shadow's: so it is looked at twice.
            let [before, of_shadow, after] = [live, shadow, live].map(|pagemap| {
                pagemap::frames(pagemap, span.start, span.end)
                    .map_err(|error| system(self.pid, "look at its page frames", error))
            });
            let (before, of_shadow, after) = (before?, of_shadow?, after?);
            let pages = (span.start..span.end).step_by(PAGE as usize);
            for (start, frame) in pages.zip(before.iter().zip(&of_shadow).zip(&after)) {
                let ((before, of_shadow), after) = frame;
                if *before != 0 && before == of_shadow && before == after {
                    same.push(Span {
                        start,
                        end: start + PAGE,
                    });
                }
            }
        }
        // What is kept by copy is not as the shadow has it.
        let same = same.difference(&image.source.copies());
        plan.copy = plan.copy.difference(&same);
        Ok(())
    }

    /// Takes pages out of what is to be copied that the process has from its parent with the very same content. To be called
    /// when the VMAs are as in the image.
    pub fn keep_equal(&self, stopped: &Stopped, image: &SpaceImage, plan: &mut Plan) -> Result<()> {
        /// Bytes compared at once.
        const PIECE: u64 = 1 << 20;
        let member = stopped.member(self.pid)?;
        let mut same = Ranges::new();
        let (mut here, mut there) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
        for span in plan.copy.pieces(PIECE) {
            let frames = pagemap::frames(&member.pagemap, span.start, span.end)
                .map_err(|error| system(self.pid, "look at its page frames", error))?;
            if frames.iter().all(|frame| *frame == 0) {
                continue;
            }
            let len = span.len() as usize;
            let (here, there) = (&mut here[..len], &mut there[..len]);
            member
                .memory
                .read_exact_at(here, span.start)
                .map_err(|error| system(self.pid, "read its memory", error))?;
            image
                .source
                .read(&[span], there)
                .map_err(|error| system(self.pid, "read its recorded pages", error))?;
            let pages = (span.start..span.end).step_by(PAGE as usize);
            let both = here.chunks(PAGE as usize).zip(there.chunks(PAGE as usize));
            for ((start, frame), (here, there)) in pages.zip(frames).zip(both) {
                if frame != 0 && here == there {
                    same.push(Span {
                        start,
                        end: start + PAGE,
                    });
                }
            }
        }
        plan.copy = plan.copy.difference(&same);
        Ok(())
    }

    fn live(&self, stopped: &Stopped) -> Result<Layout> {
        let text = read_maps(stopped.member(self.pid)?)?;
        parse_map(self.pid, &text, window_span(stopped, self.pid)?)
    }

    /// Moves the kernel's own mappings to where they were: a program that was executed has them at another place.
    fn move_specials(&self, stopped: &mut Stopped, image: &SpaceImage) -> Result<()> {
        let pid = self.pid;
        let live = self.live(stopped)?;
        let (to, from) = (specials(&image.layout), specials(&live));
        let failed = |errno| system(pid, "move the kernel's own mappings", errno);
        let offset = offset(&to, &from).ok_or_else(|| failed(Errno::EINVAL))?;
        let Some((first, last)) = to.first().zip(to.last()).filter(|_| offset != 0) else {
            return Ok(());
        };
        if from
            .iter()
            .any(|vma| vma.start < last.end && vma.end > first.start)
        {
            return Err(failed(Errno::EEXIST));
        }
        let mut batch = Batch::new();
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        for vma in from {
            let (at, len) = (vma.start.into(), vma.len().into());
            let new = vma.start.wrapping_add(offset).into();
            let moved = batch.call(libc::SYS_mremap, &[at, len, len, flags.into(), new]);
            batch.must_succeed(moved);
        }
        let outputs = stopped.run(pid, &batch)?;
        match outputs.cut_short {
            Some(errno) => Err(failed(errno)),
            None => Ok(stopped.special_mappings_moved(pid, offset)?),
        }
    }

    /// Tells the kernel where the parts of the program are, and which it is if that is another; to be called when the VMAs
    /// are as in the image.
    pub fn restore_program(
        &self,
        stopped: &mut Stopped,
        image: &SpaceImage,
        context: &Context,
    ) -> Result<()> {
        let pid = self.pid;
        let auxv = image.source.auxv()?;
        let program = match runs(pid, &image.source) {
            true => None,
            false => Some(pass_program(stopped, pid, &image.source)?),
        };
        let mut parts = ProgramMap::of(&image.source.bounds()?, image.header(context)?.brk);
        parts.auxv_size = auxv.len() as u32;
        parts.program = program.unwrap_or(-1);
        let mut batch = Batch::new();
        let auxv = batch.filled(&auxv);
        let parts = batch.filled(parts.as_bytes());
        batch.point(&parts, std::mem::offset_of!(ProgramMap, auxv), &auxv);
        let set = batch.call(
            libc::SYS_prctl,
            &[
                libc::PR_SET_MM.into(),
                PR_SET_MM_MAP.into(),
                parts.arg(),
                size_of::<ProgramMap>().into(),
                0.into(),
            ],
        );
        if let Some(number) = program {
            batch.call(libc::SYS_close, &[number.into()]);
        }
        let outputs = stopped.run(pid, &batch)?;
        outputs.result(set).map(drop).map_err(|errno| {
            let what = "prctl PR_SET_MM_MAP";
            freeze::Error::Call { pid, what, errno }.into()
        })
    }
}

impl SpaceImage {
    /// Makes it the image of the address space of a process that was made again, into which the window is open.
    pub fn move_to(&mut self, stopped: &Stopped, space: &mut Space) -> Result<()> {
        self.slots.clear();
        self.pid = space.pid;
        self.generation = stopped.member(space.pid)?.generation;
        self.new_text = None;
        if let Some(resident) = self.source.in_ram() {
            space.pages = resident.pages.store().clone();
        }
        Ok(())
    }

    /// Learns how its VMA list reads now that the process was made again.
    pub fn learn_map(&mut self, stopped: &Stopped) -> Result<()> {
        let text = read_maps(stopped.member(self.pid)?)?;
        let window = window_span(stopped, self.pid)?;
        let live = parse_map(self.pid, &text, window)?;
        if let Some(change) = self.layout.changes_from(&live).first() {
            let what = format!("make its memory map again ({change:?} is left to do)");
            return Err(system(self.pid, &what, Errno::EINVAL));
        }
        self.new_text = Some(text);
        Ok(())
    }
}
