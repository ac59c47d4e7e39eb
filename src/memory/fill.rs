//! Copying pages from where they are kept straight into a process, past the page store of its window.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::unistd::Pid;

use crate::freeze::Member;
use crate::kernel::remote_memory;
use crate::kernel::userfaultfd::WriteTracker;

use super::image::SpaceImage;
use super::ranges::{Ranges, Span};
use super::source::{PageReader, Source};
use super::space::system;
use super::{PAGE, Result};

/// Most bytes looked at at once.
const PIECE: u64 = 1 << 20;
/// Pieces that a thread takes, and for which another thread pays.
const MANY: usize = 4;

/// Copies pages to a process.
pub(super) fn with(memory: &File, pid: Pid, source: &Source, pages: &Ranges) -> Result<()> {
    let put = |span: Span, bytes: &[u8]| write(memory, pid, span, bytes);
    copy(pid, source, pages, &put)
}

/// Copies pages to a process that was made again, of which nothing is armed, and in which nothing may run meanwhile.
pub(super) fn new(
    tracker: &WriteTracker,
    member: &Member,
    image: &SpaceImage,
    pages: &Ranges,
) -> Result<()> {
    let (pid, memory) = (member.pid, &member.memory);
    // From its parent; page by page they would take three times as long.
    let there = image.layout.populated(&member.pagemap);
    let there = there.map_err(|errno| system(pid, "scan its pages", errno))?;
    let anonymous = image.layout.private().filter(|vma| vma.is_anonymous());
    let wanted = anonymous.map(Span::from).filter(|vma| pages.touches(*vma));
    // Whatever can't be opened is written to.
    let can_open = |vma: &Span| tracker.open(vma.start, vma.len()).is_ok();
    // In order, and not joined: a call is for one VMA.
    let opened: Vec<Span> = wanted.filter(can_open).collect();
    let parts = opened.iter().flat_map(|vma| {
        let lacking = Ranges::from_iter([*vma]).difference(&there);
        lacking.spans().to_vec()
    });
    let empty: Vec<Span> = parts.collect();
    let put = |span: Span, bytes: &[u8]| {
        let of = |part: Span| {
            let from = (part.start - span.start) as usize;
            &bytes[from..from + part.len() as usize]
        };
        let mut at = span.start;
        let first = empty.partition_point(|part| part.end <= span.start);
        for part in empty[first..]
            .iter()
            .take_while(|part| part.start < span.end)
        {
            let inside = Span {
                start: part.start.max(span.start),
                end: part.end.min(span.end),
            };
            let before = Span {
                start: at,
                end: inside.start,
            };
            write(memory, pid, before, of(before))?;
            put(tracker, memory, pid, inside, of(inside))?;
            at = inside.end;
        }
        let after = Span {
            start: at,
            end: span.end,
        };
        write(memory, pid, after, of(after))
    };
    copy(pid, &image.source, pages, &put)?;
    for vma in opened {
        tracker
            .close(vma.start, vma.len())
            .map_err(|errno| system(pid, "end putting pages into its memory", errno))?;
    }
    Ok(())
}

/// Puts pages into memory that is open for them. Those that are there already, from its parent, are written to; those that are
/// not can't be, before it is closed.
fn put(tracker: &WriteTracker, memory: &File, pid: Pid, span: Span, bytes: &[u8]) -> Result<()> {
    let failed = |errno| system(pid, "put pages into its memory", errno);
    let mut done = 0;
    while done < bytes.len() {
        let rest = &bytes[done..];
        let page = &rest[..rest.len().min(PAGE as usize)];
        let at = span.start + done as u64;
        let put = match tracker.put(at, rest) {
            // What was one VMA is two here.
            Err(Errno::ENOENT) => tracker.put(at, page),
            put => put,
        };
        done += match put.map_err(failed)? {
            0 => {
                let end = at + page.len() as u64;
                write(memory, pid, Span { start: at, end }, page)?;
                page.len()
            }
            put => put,
        };
    }
    Ok(())
}

/// Gives pages to `put`, by several threads if they are many.
fn copy(
    pid: Pid,
    source: &Source,
    pages: &Ranges,
    put: &(dyn Fn(Span, &[u8]) -> Result<()> + Sync),
) -> Result<()> {
    let pieces: Vec<Span> = pages.pieces(PIECE).collect();
    let next = AtomicUsize::new(0);
    // Pieces differ in size, so each thread takes some when it has done those before; some that follow one another, which
    // often are in one record of an image.
    let work = || -> Result<()> {
        let mut reader = source.reader();
        let zeroes = vec![0; PIECE as usize];
        while let Some(pieces) = pieces
            .chunks(MANY)
            .nth(next.fetch_add(1, Ordering::Relaxed))
        {
            for span in pieces {
                copy_span(pid, &mut *reader, *span, &zeroes, put)?;
            }
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.min(pieces.len().div_ceil(MANY));
    if threads <= 1 {
        return work();
    }
    std::thread::scope(|scope| {
        let copying: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        copying
            .into_iter()
            .try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(_) => Err(system(pid, "copy its pages", Errno::EIO)),
            })
    })
}

/// Gives `put` a span as a reader has it.
fn copy_span(
    pid: Pid,
    reader: &mut dyn PageReader,
    span: Span,
    zeroes: &[u8],
    put: &dyn Fn(Span, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut failed = None;
    let copied = reader.look(span, &mut |part, bytes| {
        let bytes = bytes.unwrap_or(&zeroes[..part.len() as usize]);
        put(part, bytes).map_err(|error| {
            failed = Some(error);
            std::io::ErrorKind::Other.into()
        })
    });
    match (copied, failed) {
        (Ok(()), _) => Ok(()),
        (_, Some(error)) => Err(error),
        (Err(error), None) => Err(system(pid, "read its recorded pages", error)),
    }
}

/// Writes to memory, be it that the program itself may not.
fn write(memory: &File, pid: Pid, span: Span, bytes: &[u8]) -> Result<()> {
    if span.is_empty() {
        return Ok(());
    }
    let range = remote_memory::Range {
        start: span.start,
        len: bytes.len(),
    };
    match remote_memory::write(pid, &[range], bytes) {
        Ok(()) => Ok(()),
        Err(_) => force(memory, pid, span, bytes),
    }
}

/// Writes to memory that the program itself may not write to.
pub(super) fn force(memory: &File, pid: Pid, span: Span, bytes: &[u8]) -> Result<()> {
    memory
        .write_all_at(bytes, span.start)
        .map_err(|error| system(pid, "write to its memory", error))
}
