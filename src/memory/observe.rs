//! What an address space is like now, as far as it can have changed.

use crate::freeze::{Batch, Stopped};
use crate::kernel::pagemap::{Region, Scan};
use crate::record::Context;

use super::Result;
use super::image::SpaceImage;
use super::layout::Layout;
use super::ranges::Span;
use super::space::{read_maps, refuse, system, window_span};

/// The live state of an address space.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Its VMAs; `None`: they are as in the image.
    pub layout: Option<Layout>,
    /// Its program break, asked for only if the VMAs are not as in the image.
    pub brk: Option<u64>,
    /// All of its private memory but the pages that are certainly as they were when they were armed, holes included.
    pub regions: Vec<Region>,
}

impl Observed {
    /// Looks at the address space of an image. Refuses if it is not there any more.
    pub fn look(stopped: &mut Stopped, image: &SpaceImage, context: &Context) -> Result<Self> {
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
        let mut regions = Vec::new();
        let scanned =
            |result: nix::Result<()>| result.map_err(|errno| system(pid, "scan its pages", errno));
        if text == image.maps_text(context)? {
            scanned(
                image
                    .layout
                    .scan(&member.pagemap, Scan::Suspect, &mut regions),
            )?;
            return Ok(Self {
                layout: None,
                brk: None,
                regions,
            });
        }
        let window = window_span(stopped, pid)?;
        check_window(pid, &text, window)?;
        let layout = Layout::parse(&text, Some(window)).ok_or_else(|| {
            refuse(
                pid,
                "its memory map",
                "/proc/PID/maps does not read as documented",
            )
        })?;
        let pagemap = &stopped.member(pid)?.pagemap;
        scanned(layout.scan(pagemap, Scan::Suspect, &mut regions))?;
        let mut batch = Batch::new();
        let brk = batch.call(libc::SYS_brk, &[0.into()]);
        let outputs = stopped.run(pid, &batch)?;
        Ok(Self {
            layout: Some(layout),
            brk: outputs.result(brk).ok(),
            regions,
        })
    }
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
