//! Read-ahead: an image is brought into a chain on a thread of its own, before it is needed.

use std::io::Read;
use std::sync::Arc;
use std::thread;

use parking_lot::{Condvar, Mutex};

use super::chain::Chain;
use super::decode::{Decoded, Decoder};
use super::frame::{FrameHeader, Position};
use super::index::Entry;
use super::{Context, Error, Record, Result};
use crate::kernel::memory_file::Appended;

/// Starts to read an image on a thread of its own.
///
/// Dropping the [`ReadAhead`] does not wait for the thread: it ends after the read it is in.
#[must_use]
pub fn read_ahead(reader: impl Read + Send + 'static) -> ReadAhead {
    let shared = Arc::new(Shared::default());
    let filler = Filler(Arc::clone(&shared));
    let started = thread::Builder::new()
        .name("read-ahead".into())
        .spawn(move || filler.run(reader));
    if let Err(source) = started {
        let at = Position {
            record: 0,
            offset: 0,
            kind: None,
        };
        shared.progress.lock().end = Some(End::Failed(Some(Error::Source { at, source })));
    }
    ReadAhead {
        shared,
        next: 0,
        chunks: Vec::new(),
    }
}

#[derive(Debug, Default)]
struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
}

/// How far the thread is.
#[derive(Debug, Default)]
struct Progress {
    chunks: Vec<Appended>,
    entries: Vec<Entry>,
    end: Option<End>,
    /// Nobody reads any more.
    abandoned: bool,
}

#[derive(Debug)]
enum End {
    Complete,
    /// Why, until it was reported.
    Failed(Option<Error>),
}

/// The thread's side. However it ends, the cursor learns of it.
struct Filler(Arc<Shared>);

impl Filler {
    fn run(self, reader: impl Read) {
        let mut decoder = Decoder::new(reader);
        loop {
            let next = decoder.next();
            let mut progress = self.0.progress.lock();
            match next {
                Ok(Some(Decoded { entry, new_chunk })) => {
                    progress.chunks.extend(new_chunk);
                    progress.entries.push(entry);
                }
                Ok(None) => progress.end = Some(End::Complete),
                Err(error) => progress.end = Some(End::Failed(Some(error))),
            }
            let done = progress.end.is_some() || progress.abandoned;
            drop(progress);
            self.0.changed.notify_all();
            if done {
                return;
            }
        }
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        let mut progress = self.0.progress.lock();
        progress
            .end
            .get_or_insert(End::Failed(Some(Error::ReaderDied)));
        drop(progress);
        self.0.changed.notify_all();
    }
}

/// An image on its way into memory, and a cursor on it.
#[derive(Debug)]
pub struct ReadAhead {
    shared: Arc<Shared>,
    next: usize,
    /// Chunks this side has met; records are read in place there.
    chunks: Vec<Appended>,
}

impl ReadAhead {
    /// The next record, in place; waits for it if it is not there yet. `None` after the trailer.
    ///
    /// Each record was checked by its own checksum. That the image is whole is known when `None` comes.
    ///
    /// # Errors
    ///
    /// As [`Context::load`], after all records before the faulty one; then [`Error::Broken`]. [`Error::ReaderDied`] if
    /// the reader panicked.
    #[allow(
        clippy::should_implement_trait,
        reason = "the record borrows from the cursor"
    )]
    pub fn next(&mut self) -> Result<Option<Record<'_>>> {
        let mut progress = self.shared.progress.lock();
        while progress.entries.len() <= self.next && progress.end.is_none() {
            self.shared.changed.wait(&mut progress);
        }
        let Some(&entry) = progress.entries.get(self.next) else {
            return match &mut progress.end {
                Some(End::Failed(error)) => Err(error.take().unwrap_or(Error::Broken)),
                _ => Ok(None),
            };
        };
        let met = self.chunks.len();
        self.chunks.extend_from_slice(&progress.chunks[met..]);
        drop(progress);
        let sequence = self.next as u64;
        self.next += 1;
        let Entry {
            place,
            payload_len,
            kind,
            version,
            id,
        } = entry;
        let frame = &self.chunks[place.chunk as usize].bytes()[place.start as usize..][..place.len];
        let payload = &frame[FrameHeader::LEN..][..payload_len];
        Ok(Some(Record {
            kind,
            version,
            id,
            sequence,
            payload,
        }))
    }

    /// How many records are there to be read without waiting.
    #[must_use]
    pub fn ready(&self) -> usize {
        self.shared.progress.lock().entries.len() - self.next
    }

    /// Waits for the end of the image and gives the whole of it, wherever the cursor was.
    ///
    /// # Errors
    ///
    /// As [`Context::load`].
    pub fn into_context(self) -> Result<Context> {
        let mut progress = self.shared.progress.lock();
        while progress.end.is_none() {
            self.shared.changed.wait(&mut progress);
        }
        if let Some(End::Failed(error)) = &mut progress.end {
            return Err(error.take().unwrap_or(Error::Broken));
        }
        let chain = Chain::read(std::mem::take(&mut progress.chunks));
        Ok(Context::loaded(
            chain,
            std::mem::take(&mut progress.entries),
        ))
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.shared.progress.lock().abandoned = true;
    }
}
