//! Makes the content of a file what another is, or what is kept, and compares them. Only what differs is written.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::store::{Kept, PIECE, Segment, data_of};

/// Bytes that are compared, and written if they differ.
const BLOCK: usize = 4096;

/// Something to read content from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// The store.
    Kept(&'a Kept),
    /// A file.
    File(&'a File, u64),
}

impl Source<'_> {
    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Kept(kept) => kept.size,
            Self::File(_, size) => *size,
        }
    }

    /// What of it is not a hole.
    fn data(&self) -> io::Result<Vec<Segment>> {
        match self {
            Self::Kept(kept) => Ok(kept.segments.clone()),
            Self::File(file, size) => Ok(data_of(file, *size)?
                .into_iter()
                .map(|(offset, length)| Segment::in_place(offset, length))
                .collect()),
        }
    }

    fn read_exact_at(&self, segment: &Segment, buffer: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            Self::Kept(kept) => kept.read_exact_at(segment, buffer, at),
            Self::File(file, _) => file.read_exact_at(buffer, at),
        }
    }
}

/// Calls `each` with every block of `source`'s data: where it is and what it is to be, and what `live` has there, which is
/// shorter where `live` ends. Holes of `source` are given to `hole`.
fn compare(
    live: &File,
    source: Source<'_>,
    mut each: impl FnMut(u64, &[u8], &[u8]) -> io::Result<()>,
    mut hole: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let (mut wanted, mut found) = (vec![0; PIECE], vec![0; PIECE]);
    let mut end = 0;
    for segment in source.data()? {
        if segment.offset > end {
            hole(end, segment.offset - end)?;
        }
        end = segment.offset + segment.length;
        let mut at = segment.offset;
        while at < end {
            let length = (end - at).min(PIECE as u64) as usize;
            source.read_exact_at(&segment, &mut wanted[..length], at)?;
            let there = read_at(live, &mut found[..length], at)?;
            if wanted[..length] != found[..there] {
                for start in (0..length).step_by(BLOCK) {
                    let stop = (start + BLOCK).min(length);
                    let found = &found[start.min(there)..stop.min(there)];
                    each(at + start as u64, &wanted[start..stop], found)?;
                }
            }
            at += length as u64;
        }
    }
    if source.size() > end {
        hole(end, source.size() - end)?;
    }
    Ok(())
}

/// Reads until the buffer is full or the file ends.
fn read_at(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], at + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// The first byte in which a file differs, or the size if that does. Holes count as zeroes.
pub fn first_difference(live: &File, source: Source<'_>) -> io::Result<Option<u64>> {
    let size = live.metadata()?.len();
    let mut first = (size != source.size()).then(|| size.min(source.size()));
    let mut note = |at: u64| first = Some(first.map_or(at, |first| first.min(at)));
    let mut holes = Vec::new();
    compare(
        live,
        source,
        |at, wanted, found| {
            if wanted != found {
                let same = wanted
                    .iter()
                    .zip(found)
                    .take_while(|(one, other)| one == other);
                note(at + same.count() as u64);
            }
            Ok(())
        },
        |at, length| {
            holes.push((at, length));
            Ok(())
        },
    )?;
    for (at, length) in holes {
        if let Some(at) = first_not_zero(live, at, length)? {
            note(at);
        }
    }
    Ok(first)
}

fn first_not_zero(live: &File, at: u64, length: u64) -> io::Result<Option<u64>> {
    let end = (at + length).min(live.metadata()?.len());
    let mut buffer = vec![0; PIECE];
    for (offset, length) in data_of(live, end)? {
        let (mut from, to) = (offset.max(at), offset + length);
        while from < to {
            let piece = &mut buffer[..(to - from).min(PIECE as u64) as usize];
            let count = read_at(live, piece, from)?;
            if count == 0 {
                break;
            }
            if let Some(index) = piece[..count].iter().position(|&byte| byte != 0) {
                return Ok(Some(from + index as u64));
            }
            from += count as u64;
        }
    }
    Ok(None)
}

/// Makes a file's content what `source` is, with its holes; returns the bytes written.
pub fn put_back(live: &File, source: Source<'_>) -> io::Result<u64> {
    let size = source.size();
    if live.metadata()?.len() != size {
        live.set_len(size)?;
    }
    let mut written = 0;
    let mut holes = Vec::new();
    // Neighbours are written together.
    let mut pending: (u64, Vec<u8>) = (0, Vec::new());
    compare(
        live,
        source,
        |at, wanted, found| {
            if wanted == found {
                return Ok(());
            }
            written += wanted.len() as u64;
            if pending.0 + pending.1.len() as u64 != at || pending.1.len() >= PIECE {
                live.write_all_at(&pending.1, pending.0)?;
                pending = (at, Vec::new());
            }
            pending.1.extend_from_slice(wanted);
            Ok(())
        },
        |at, length| {
            holes.push((at, length));
            Ok(())
        },
    )?;
    live.write_all_at(&pending.1, pending.0)?;
    for (at, length) in holes {
        dig(live, at, length)?;
    }
    Ok(written)
}

/// Fills an empty file with content, sharing blocks where that works; returns the bytes copied.
pub fn fill(live: &File, source: Source<'_>) -> io::Result<u64> {
    live.set_len(source.size())?;
    let mut buffer = vec![0; PIECE];
    let mut written = 0;
    for segment in source.data()? {
        let shared = match source {
            Source::Kept(kept) => kept.share_into(&segment, live),
            Source::File(..) => 0,
        };
        let (mut at, end) = (segment.offset + shared, segment.offset + segment.length);
        while at < end {
            let piece = &mut buffer[..(end - at).min(PIECE as u64) as usize];
            source.read_exact_at(&segment, piece, at)?;
            live.write_all_at(piece, at)?;
            at += piece.len() as u64;
            written += piece.len() as u64;
        }
    }
    Ok(written)
}

/// Makes a hole where there is data.
fn dig(file: &File, at: u64, length: u64) -> io::Result<()> {
    let end = at + length;
    let data = data_of(file, end)?;
    for (offset, length) in data {
        let (from, to) = (offset.max(at), offset + length);
        if from >= to {
            continue;
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(file.as_raw_fd(), flags, from as i64, (to - from) as i64) {
            Ok(()) => {}
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                let zeroes = vec![0; PIECE];
                let mut from = from;
                while from < to {
                    let piece = (to - from).min(PIECE as u64) as usize;
                    file.write_all_at(&zeroes[..piece], from)?;
                    from += piece as u64;
                }
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::filesystem::store::Store;

    /// A file of runs of data and holes.
    fn file(parts: &[(bool, u16, u8)]) -> File {
        let file = tempfile::tempfile().unwrap();
        let mut at = 0;
        for (is_data, length, byte) in parts {
            let length = u64::from(*length) * 37;
            if *is_data {
                file.write_all_at(&vec![*byte; length as usize], at)
                    .unwrap();
            }
            at += length;
        }
        file.set_len(at).unwrap();
        file
    }

    fn all(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn parts() -> impl Strategy<Value = Vec<(bool, u16, u8)>> {
        proptest::collection::vec((any::<bool>(), 0u16..600, 0u8..3), 0..7)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_put_back_is_what_was_kept(was in parts(), is in parts()) {
            let directory = tempfile::tempdir().unwrap();
            let mut store = Store::new(directory.path().to_owned(), None);
            let (was, is) = (file(&was), file(&is));
            let size = was.metadata().unwrap().len();
            let kept = store.keep(&was, size, 1, Path::new("/nonexistent")).unwrap();
            let differs = all(&was).iter().zip(&all(&is)).position(|(one, other)| one != other);
            let shorter = all(&was).len().min(all(&is).len());
            let expected = differs.or((all(&was).len() != all(&is).len()).then_some(shorter));
            prop_assert_eq!(first_difference(&is, Source::Kept(&kept)).unwrap(), expected.map(|at| at as u64));
            put_back(&is, Source::Kept(&kept)).unwrap();
            prop_assert_eq!(all(&was), all(&is));
            prop_assert!(is.metadata().unwrap().blocks() <= was.metadata().unwrap().blocks() + 8);
            prop_assert_eq!(put_back(&is, Source::Kept(&kept)).unwrap(), 0);
            let empty = tempfile::tempfile().unwrap();
            fill(&empty, Source::Kept(&kept)).unwrap();
            prop_assert_eq!(all(&was), all(&empty));
            drop(kept);
            prop_assert_eq!(store.used(), 0);
        }
    }
}
