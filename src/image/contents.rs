//! What of a checkpoint has pages: address spaces, shared memory, files without a name.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::parts::{Nameless, NamelessContent};
use super::write::Content;
use crate::filesystem::store::{Kept, Segment};
use crate::kernel::sparse::data_of;
use crate::memory::{PAGE, Ranges, SharedContent, SpaceContent, Span};
use crate::record::ObjectId;

impl Content for &SpaceContent {
    fn id(&self) -> ObjectId {
        self.id
    }

    fn name(&self) -> String {
        format!("address space {}", self.id)
    }

    fn is_stable(&self) -> bool {
        true
    }

    fn read(&self, spans: &[Span], buffer: &mut [u8]) -> io::Result<()> {
        SpaceContent::read(self, spans, buffer)
    }
}

impl Content for &SharedContent {
    fn id(&self) -> ObjectId {
        self.id
    }

    fn name(&self) -> String {
        format!("shared memory {}", self.id)
    }

    fn is_stable(&self) -> bool {
        true
    }

    fn read(&self, spans: &[Span], buffer: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes();
        read_each(spans, buffer, |offset, buffer| {
            let from = (offset as usize).min(bytes.len());
            let there = &bytes[from..(from + buffer.len()).min(bytes.len())];
            buffer[..there.len()].copy_from_slice(there);
            buffer[there.len()..].fill(0);
            Ok(())
        })
    }
}

/// A file without a name, of which the content is read.
pub(super) struct NamelessPages<'p> {
    id: ObjectId,
    nameless: &'p Nameless,
    /// Of one that is read as it is.
    live: Option<File>,
}

impl<'p> NamelessPages<'p> {
    pub(super) fn open(id: ObjectId, nameless: &'p Nameless) -> io::Result<Self> {
        let live = match &nameless.content {
            NamelessContent::Kept(_) => None,
            NamelessContent::Live(pin) => {
                Some(File::open(format!("/proc/self/fd/{}", pin.as_raw_fd()))?)
            }
        };
        Ok(Self { id, nameless, live })
    }

    /// What of it is not a hole, in whole pages.
    pub(super) fn ranges(&self) -> io::Result<Ranges> {
        let size = self.nameless.file.size;
        let data = match (&self.nameless.content, &self.live) {
            (NamelessContent::Kept(kept), _) => return Ok(ranges_of(kept)),
            (NamelessContent::Live(_), Some(live)) => data_of(live, size)?,
            (NamelessContent::Live(_), None) => Vec::new(),
        };
        Ok(whole(
            data.into_iter().map(|(start, end)| Span { start, end }),
        ))
    }
}

impl Content for NamelessPages<'_> {
    fn id(&self) -> ObjectId {
        self.id
    }

    fn name(&self) -> String {
        format!("the file {}", self.nameless.file.path.display())
    }

    fn is_stable(&self) -> bool {
        self.live.is_none()
    }

    fn read(&self, spans: &[Span], buffer: &mut [u8]) -> io::Result<()> {
        match (&self.nameless.content, &self.live) {
            (NamelessContent::Kept(kept), _) => read_kept(kept, spans, buffer),
            (NamelessContent::Live(_), Some(live)) => read_each(spans, buffer, |offset, buffer| {
                let mut filled = 0;
                while filled < buffer.len() {
                    match live.read_at(&mut buffer[filled..], offset + filled as u64)? {
                        0 => break,
                        count => filled += count,
                    }
                }
                buffer[filled..].fill(0);
                Ok(())
            }),
            (NamelessContent::Live(_), None) => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// The content of a file as it was at the checkpoint.
pub(super) struct KeptPages<'p> {
    id: ObjectId,
    kept: &'p Kept,
}

impl<'p> KeptPages<'p> {
    pub(super) fn new(id: ObjectId, kept: &'p Kept) -> Self {
        Self { id, kept }
    }

    /// What of it is not a hole, in whole pages.
    pub(super) fn ranges(&self) -> Ranges {
        ranges_of(self.kept)
    }
}

impl Content for KeptPages<'_> {
    fn id(&self) -> ObjectId {
        self.id
    }

    fn name(&self) -> String {
        format!("the content of a file, {} bytes", self.kept.size)
    }

    fn is_stable(&self) -> bool {
        true
    }

    fn read(&self, spans: &[Span], buffer: &mut [u8]) -> io::Result<()> {
        read_kept(self.kept, spans, buffer)
    }
}

fn ranges_of(kept: &Kept) -> Ranges {
    let span = |segment: &Segment| Span {
        start: segment.offset,
        end: segment.offset + segment.length,
    };
    whole(kept.segments.iter().map(span))
}

fn read_kept(kept: &Kept, spans: &[Span], buffer: &mut [u8]) -> io::Result<()> {
    read_each(spans, buffer, |offset, buffer| {
        buffer.fill(0);
        let end = offset + buffer.len() as u64;
        let after = |segment: &Segment| segment.offset + segment.length <= offset;
        let first = kept.segments.partition_point(after);
        let inside = kept.segments[first..].iter();
        for segment in inside.take_while(|segment| segment.offset < end) {
            let (from, to) = (
                segment.offset.max(offset),
                (segment.offset + segment.length).min(end),
            );
            let part = &mut buffer[(from - offset) as usize..(to - offset) as usize];
            kept.read_exact_at(segment, part, from)?;
        }
        Ok(())
    })
}

/// Spans made longer to whole pages.
pub(super) fn whole(spans: impl Iterator<Item = Span>) -> Ranges {
    let whole = |span: Span| Span {
        start: span.start / PAGE * PAGE,
        end: span.end.next_multiple_of(PAGE),
    };
    spans.map(whole).collect()
}

fn read_each(
    spans: &[Span],
    buffer: &mut [u8],
    read: impl Fn(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut rest = buffer;
    for span in spans {
        let (here, after) = rest.split_at_mut(span.len() as usize);
        read(span.start, here)?;
        rest = after;
    }
    Ok(())
}
