//! What an address space is like now, as far as it can have changed.

use crate::freeze::Stopped;
use crate::kernel::pagemap::{self, Backing, Region, Scan};
use crate::record::Context;

use super::image::SpaceImage;
use super::layout::Layout;
use super::ranges::{Ranges, Span};
use super::space::{parse_map, read_maps, refuse, system, window_span};
use super::{PAGE, Result};

/// The live state of an address space.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Its VMAs; `None`: they are as in the image.
    pub layout: Option<Layout>,
    /// Its program break, if it is known; it matters only if the VMAs are not as in the image.
    pub brk: Option<u64>,
    /// Its private memory but what is there and still armed; holes are among it.
    pub suspect: Vec<Region>,
    /// Where files are behind it, the anonymous pages among those that are suspect or were recorded: a page that was
    /// dropped since may show the file and be as armed as before.
    pub of_files: Vec<Region>,
}

/// Pages between two that are looked at for what is behind them are looked at too if they are so few.
const NEAR: u64 = 16 * PAGE;

impl Observed {
    /// Looks at the address space of an image, whose VMAs are as [`look_at_map`] has found and whose populated pages are
    /// given. Batches may run in it meanwhile.
    pub fn look(
        stopped: &Stopped,
        image: &SpaceImage,
        layout: Option<Layout>,
        populated: &Ranges,
    ) -> Result<Self> {
        let pagemap = &stopped.member(image.pid)?.pagemap;
        let failed = |errno| system(image.pid, "scan its pages", errno);
        let live = layout.as_ref().unwrap_or(&image.layout);
        let mut suspect = Vec::new();
        live.scan(pagemap, Scan::Suspect, Span::ALL, &mut suspect)
            .map_err(failed)?;

        let there = suspect
            .iter()
            .filter(|region| region.categories.is_populated());
        let files = live.private().filter(|vma| !vma.is_anonymous());
        let in_question = there
            .map(Span::from)
            .collect::<Ranges>()
            .union(populated)
            .intersection(&files.map(Span::from).collect());
        let mut of_files = Vec::new();
        for span in in_question.bridged(NEAR).spans() {
            let what = Scan::Populated(Backing::File);
            pagemap::scan(pagemap, what, span.start, span.end, &mut of_files).map_err(failed)?;
        }
        Ok(Self {
            layout,
            brk: None,
            suspect,
            of_files,
        })
    }
}

/// Reads the VMAs of the address space of an image; `None`: they are as in the image. Refuses if the address space, the
/// image's shadow or the window is not there any more.
pub fn look_at_map(
    stopped: &Stopped,
    image: &SpaceImage,
    context: &Context,
) -> Result<Option<Layout>> {
    let pid = image.pid;
    if stopped
        .process(pid)
        .is_none_or(|process| process.is_zombie())
    {
        return Err(refuse(
            pid,
            "the process",
            "it has exited since the checkpoint and can't be brought back yet; take a new checkpoint",
        ));
    }
    let member = stopped.member(pid)?;
    let text = read_maps(member)?;
    if text.is_empty() || member.generation != image.generation {
        return Err(refuse(
            pid,
            "its address space",
            "the process has executed another program since the checkpoint; that can't be undone yet",
        ));
    }
    if !image.shadow.is_alive() {
        return Err(refuse(
            pid,
            format!("its shadow, pid {}", image.shadow.pid),
            "something has killed it (a kill of all processes, or a memory limit); take a new checkpoint",
        ));
    }
    if text == image.maps_text(context)? {
        return Ok(None);
    }
    let window = window_span(stopped, pid)?;
    check_window(pid, &text, window)?;
    parse_map(pid, &text, window).map(Some)
}

/// Refuses if the program has unmapped or replaced the window: no code can be run through it then.
fn check_window(pid: nix::unistd::Pid, text: &[u8], window: Span) -> Result<()> {
    let vmas = crate::kernel::maps::parse(text).unwrap_or_default();
    let mut at = window.start;
    for vma in vmas
        .iter()
        .filter(|vma| vma.start < window.end && vma.end > window.start)
    {
        if vma.start == at && vma.name.starts_with(b"/memfd:snapback") {
            at = vma.end;
        }
    }
    if at == window.end {
        return Ok(());
    }
    Err(refuse(
        pid,
        "the window that snapback keeps in its address space",
        "the program has unmapped it, and memory can't be put back through it; release the checkpoints and take a new one",
    ))
}
