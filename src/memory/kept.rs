//! What a shadow has, copied out of it when it is about to end: the PID namespace that it lives in is ending.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use memmap2::MmapMut;
use nix::unistd::Pid;

use crate::kernel::maps::Vma;
use crate::kernel::memory_file::map_memory_file;
use crate::kernel::pagemap::Scan;
use crate::kernel::procfs;

use super::layout::Layout;
use super::ranges::{Ranges, Span};
use super::room::check_available;
use super::shadow::Shadow;
use super::source::{self, Base, Look, PageReader, Pages, Stored};
use super::space::system;
use super::{PAGE, Result};

/// Most bytes that are copied at once.
const PIECE: u64 = 4 << 20;

/// Pages in RAM of ours.
#[derive(Debug)]
struct Copies {
    /// Where they were: in order, as they are in `bytes`.
    ranges: Ranges,
    /// Where each of the ranges begins in `bytes`.
    begins: Vec<usize>,
    bytes: MmapMut,
}

/// Copies out of a shadow which [is about to end](Shadow::is_ending) all that it has.
///
/// # Errors
///
/// Refused if there is not memory enough; or the kernel was faster.
pub(super) fn keep(base: &Base) -> Result<Stored> {
    let shadow = &base.shadow;
    let pid = shadow.pid;
    let failed = |what: &'static str| move |error: io::Error| system(pid, what, error);
    let layout = Layout {
        vmas: base.vmas()?.to_vec(),
        window: None,
    };
    let scan = "scan a shadow that ends";
    let populated = layout
        .populated(&shadow.pagemap)
        .map_err(|errno| system(pid, scan, errno))?;
    let mut guards = Vec::new();
    layout
        .scan(&shadow.pagemap, Scan::Guards, Span::ALL, &mut guards)
        .map_err(|errno| system(pid, scan, errno))?;
    let guards: Ranges = guards.iter().map(Span::from).collect();
    check_available(&format!("the shadow {pid}"), populated.bytes())?;
    let pages = Copies::read(shadow, populated.difference(&guards))
        .map_err(failed("copy the pages of a shadow that ends"))?;
    let program = open_path(&procfs::path(pid, "exe")).map_err(failed("open its program"))?;
    // By its name as it is now: the mounts that lead there are about to go.
    let program_path = std::fs::read_link(format!("/proc/self/fd/{}", program.as_raw_fd()))
        .map_err(failed("tell the path of its program"))?;
    let mut files = BTreeMap::new();
    for vma in layout.vmas.iter() {
        let key = (vma.device, vma.inode);
        if vma.is_anonymous() || vma.is_special() || files.contains_key(&key) {
            continue;
        }
        let file = pin(pid, vma).map_err(failed("open a mapped file"))?;
        files.insert(key, file);
    }
    Ok(Stored {
        smaps: source::smaps(pid)?,
        policies: source::policies(pid)?,
        guards,
        bounds: source::bounds(pid)?,
        auxv: source::auxv(pid)?,
        program,
        program_path,
        files,
        pages: Arc::new(pages),
    })
}

/// Opens the file behind a VMA of a process: an `O_PATH` descriptor.
pub(super) fn pin(pid: Pid, vma: &Vma) -> io::Result<File> {
    let name = format!("map_files/{:x}-{:x}", vma.start, vma.end);
    open_path(&procfs::path(pid, &name))
}

fn open_path(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
}

impl Copies {
    fn read(shadow: &Shadow, ranges: Ranges) -> io::Result<Self> {
        let len = ranges.bytes() as usize;
        // A mapping cannot be empty.
        let mut bytes = map_memory_file(c"snapback kept", len.max(1))?;
        let mut begins = Vec::with_capacity(ranges.spans().len());
        let mut at = 0;
        for span in ranges.spans() {
            begins.push(at);
            at += span.len() as usize;
        }
        let mut rest = &mut bytes[..len];
        let mut pieces: Vec<Span> = Vec::new();
        let mut gathered = 0;
        for piece in ranges.pieces(PIECE) {
            if gathered + piece.len() > PIECE {
                rest = fill(shadow, &pieces, rest)?;
                pieces.clear();
                gathered = 0;
            }
            gathered += piece.len();
            pieces.push(piece);
        }
        fill(shadow, &pieces, rest)?;
        Ok(Self {
            ranges,
            begins,
            bytes,
        })
    }
}

/// Reads pages to the front of `buffer`; returns the rest of that.
fn fill<'b>(shadow: &Shadow, pieces: &[Span], buffer: &'b mut [u8]) -> io::Result<&'b mut [u8]> {
    let len: u64 = pieces.iter().map(Span::len).sum();
    let (here, rest) = buffer.split_at_mut(len as usize);
    if !pieces.is_empty() {
        shadow.read(pieces, here)?;
    }
    Ok(rest)
}

impl Pages for Copies {
    fn reader(&self) -> Box<dyn PageReader + '_> {
        Box::new(self)
    }

    fn own_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }
}

impl PageReader for &Copies {
    /// A page that was not copied is an error: who asks for it knows that it was there.
    fn look(&mut self, span: Span, each: &mut Look<'_>) -> io::Result<()> {
        let mut at = span.start;
        while at < span.end {
            let number = self.ranges.spans().partition_point(|of| of.end <= at);
            let of = self.ranges.spans().get(number);
            let of = of.filter(|of| of.start <= at).ok_or_else(|| {
                let problem = format!("the page {:#x} was not kept", at / PAGE * PAGE);
                io::Error::new(ErrorKind::NotFound, problem)
            })?;
            let part = Span {
                start: at,
                end: of.end.min(span.end),
            };
            let from = self.begins[number] + (at - of.start) as usize;
            each(part, Some(&self.bytes[from..from + part.len() as usize]))?;
            at = part.end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_found_by_their_addresses_and_others_are_an_error() {
        let page = |number: u64| number * PAGE;
        let span = |first, end| Span {
            start: page(first),
            end: page(end),
        };
        let ranges: Ranges = [span(1, 3), span(7, 8)].into_iter().collect();
        let mut bytes = map_memory_file(c"test", 3 * PAGE as usize).unwrap();
        for (page, number) in bytes.chunks_mut(PAGE as usize).zip([1, 2, 7]) {
            page.fill(number);
        }
        let copies = Copies {
            ranges,
            begins: vec![0, 2 * PAGE as usize],
            bytes,
        };
        let read = |spans: &[Span]| {
            let len: u64 = spans.iter().map(Span::len).sum();
            let mut buffer = vec![0; len as usize];
            let read = source::read_spans(&copies, spans, &mut buffer);
            read.map(|()| {
                buffer
                    .chunks(PAGE as usize)
                    .map(|page| page[0])
                    .collect::<Vec<_>>()
            })
        };
        assert_eq!(read(&[span(2, 3), span(7, 8)]).unwrap(), [2, 7]);
        assert_eq!(read(&[span(1, 3)]).unwrap(), [1, 2]);
        for missing in [span(0, 1), span(3, 4), span(2, 4), span(8, 9)] {
            assert!(read(&[missing]).is_err(), "{missing:?}");
        }
    }
}
