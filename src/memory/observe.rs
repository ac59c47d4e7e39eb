//! What an address space is like now, as far as it can have changed.

use nix::unistd::Pid;

use crate::freeze::Stopped;
use crate::kernel::pagemap::{self, Backing, Region, Scan};
use crate::kernel::procfs;
use crate::outcome::Refusal;
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
        let live = layout.as_ref().unwrap_or(&image.layout);
        let observed = Self::look_at_pages(stopped, image.pid, live, populated)?;
        Ok(Self { layout, ..observed })
    }

    /// Looks at the pages of an address space that has these VMAs.
    pub(super) fn look_at_pages(
        stopped: &Stopped,
        pid: Pid,
        live: &Layout,
        populated: &Ranges,
    ) -> Result<Self> {
        let pagemap = &stopped.member(pid)?.pagemap;
        let failed = |errno| system(pid, "scan its pages", errno);
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
            layout: None,
            brk: None,
            suspect,
            of_files,
        })
    }
}

/// What became of the VMAs of an image.
#[derive(Debug)]
pub enum Map {
    /// They are as in the image.
    Same,
    /// They are these.
    Other(Layout),
    /// The process has another address space, or none that can be changed; and the refusal if it can't be made again.
    Gone(Refusal),
}

/// Reads the VMAs of the address space of an image, whose process is there. Refuses if the image's shadow is not.
pub fn look_at_map(stopped: &Stopped, image: &SpaceImage, context: &Context) -> Result<Map> {
    let pid = image.pid;
    check_shadow(image)?;
    let gone = |object: &str, remedy: &str| {
        Ok(Map::Gone(Refusal {
            object: object.into(),
            holder: format!("pid {pid} ({})", procfs::comm(pid)),
            remedy: remedy.into(),
        }))
    };
    let member = stopped.member(pid)?;
    let text = read_maps(member)?;
    if text.is_empty() || member.generation != image.generation {
        return gone(
            "its address space",
            "the process has executed another program since the checkpoint",
        );
    }
    let recorded = match &image.new_text {
        Some(text) => text,
        None => image.maps_text(context)?,
    };
    if text == recorded {
        return Ok(Map::Same);
    }
    let window = window_span(stopped, pid)?;
    if !has_window(&text, window) {
        return gone(
            "the window that snapback keeps in its address space",
            "the program has unmapped it, and memory can't be put back through it",
        );
    }
    parse_map(pid, &text, window).map(Map::Other)
}

/// Refuses if the shadow of an image is not there any more; one that is on disk needs none.
pub(super) fn check_shadow(image: &SpaceImage) -> Result<()> {
    let Some(shadow) = image.source.shadow() else {
        return Ok(());
    };
    if shadow.is_alive() {
        return Ok(());
    }
    Err(refuse(
        image.pid,
        format!("its shadow, pid {}", shadow.pid),
        "something has killed it (a kill of all processes, or a memory limit); take a new checkpoint",
    ))
}

/// Whether the program has neither unmapped nor replaced the window.
fn has_window(text: &[u8], window: Span) -> bool {
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
    at == window.end
}
