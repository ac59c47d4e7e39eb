//! The context: owns everything that one checkpoint holds as headers.

use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;
use zerocopy::{FromBytes, IntoBytes};

use super::chain::{Chain, Place};
use super::frame::{Digest, FrameHeader, ImageHeader, MAX_PAYLOAD, Prologue, Trailer, padded};
use super::index::{Entry, Index};
use super::object::ObjectTable;
use super::{Error, Interned, Kind, ObjectId, ObjectKey, Record, RecordRef, Result, Stats};

/// Space for one record, to be filled through [`Context::payload`]. Ends in [`Context::commit`] or
/// [`Context::cancel`]; one that is merely dropped makes [`Context::finish`] fail.
#[derive(Debug)]
#[must_use = "a reservation ends in commit or cancel"]
pub struct Reservation {
    context: u32,
    place: Place,
    kind: Kind,
    id: ObjectId,
    payload_len: usize,
}

impl Reservation {
    /// The kind it was made for.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The object it was made for.
    #[must_use]
    pub const fn id(&self) -> ObjectId {
        self.id
    }
}

enum Mode {
    /// Committed records stay in the chain.
    Buffering,
    /// Committed records go to the sink; the lock only makes the context `Sync`.
    Streaming(Mutex<Box<dyn Write + Send>>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Finished,
    /// A write to the sink failed.
    Broken,
}

/// Owns everything that one checkpoint holds as headers: a buffer chain of framed records and an object table.
///
/// A *buffering* context keeps committed records in its chain, where they are read in place and never moved;
/// [`Context::write_out`] sends them all later. A *streaming* context writes each record to its sink as it is
/// committed and reuses the space; its `write_out` does nothing. The bytes are the same, in the order of the commits.
///
/// Each object has at most one record of a kind ([`Kind::is_repeated`] names the exception). An object's records are committed before those of its users:
/// [`Context::refer`] checks that.
///
/// Dropping the context frees everything.
pub struct Context {
    serial: u32,
    mode: Mode,
    state: State,
    chain: Chain,
    index: Index,
    objects: ObjectTable,
    open: usize,
    digest: Digest,
    stats: Stats,
}

impl Context {
    /// A context that keeps its records.
    ///
    /// # Errors
    ///
    /// [`Error::Chunk`] if there is no memory.
    pub fn buffering() -> Result<Context> {
        Context::buffering_as(ImageHeader::here())
    }

    /// As [`Context::buffering`], with an image header of the caller's.
    ///
    /// # Errors
    ///
    /// [`Error::Chunk`] if there is no memory.
    pub fn buffering_as(header: ImageHeader) -> Result<Context> {
        Context::start(Mode::Buffering, header)
    }

    /// A context that writes each record to `sink` as it is committed.
    ///
    /// # Errors
    ///
    /// [`Error::Chunk`] if there is no memory, [`Error::Sink`] if the image header can't be written.
    pub fn streaming(sink: Box<dyn Write + Send>) -> Result<Context> {
        Context::streaming_as(sink, ImageHeader::here())
    }

    /// As [`Context::streaming`], with an image header of the caller's.
    ///
    /// # Errors
    ///
    /// [`Error::Chunk`] if there is no memory, [`Error::Sink`] if the image header can't be written.
    pub fn streaming_as(mut sink: Box<dyn Write + Send>, header: ImageHeader) -> Result<Context> {
        sink.write_all(Prologue::CURRENT.as_bytes())
            .map_err(Error::Sink)?;
        Context::start(Mode::Streaming(Mutex::new(sink)), header)
    }

    /// As [`Context::streaming_as`], for what goes beside another image: objects are that image's, under its ids.
    ///
    /// # Errors
    ///
    /// [`Error::Chunk`] if there is no memory, [`Error::Sink`] if the image header can't be written.
    pub fn streaming_beside(sink: Box<dyn Write + Send>, header: ImageHeader) -> Result<Context> {
        let mut context = Context::streaming_as(sink, header)?;
        context.objects = ObjectTable::of_another();
        Ok(context)
    }

    fn start(mode: Mode, header: ImageHeader) -> Result<Context> {
        let mut context = Context::empty(mode);
        context.write(Kind::ImageHeader, ObjectId::IMAGE, &[header.as_bytes()])?;
        Ok(context)
    }

    /// The context that an image was read into.
    pub(super) fn loaded(chain: Chain, entries: Vec<Entry>) -> Context {
        let mut context = Context::empty(Mode::Buffering);
        context.state = State::Finished;
        context.chain = chain;
        for entry in entries {
            context
                .stats
                .add(entry.kind, entry.payload_len as u64, entry.place.len as u64);
            context.index.keep(entry);
        }
        context
    }

    fn empty(mode: Mode) -> Context {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        Context {
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
            mode,
            state: State::Open,
            chain: Chain::default(),
            index: Index::default(),
            objects: ObjectTable::new(),
            open: 0,
            digest: Digest::default(),
            stats: Stats {
                bytes: Prologue::LEN as u64,
                ..Stats::default()
            },
        }
    }

    /// Sets space for a record aside. Reservations nest and may end in any order; the order of the image is that of
    /// the commits.
    ///
    /// # Errors
    ///
    /// [`Error::Chunk`], [`Error::TooLong`], [`Error::Duplicate`] if the object has a record of this kind,
    /// [`Error::UnknownObject`] if `id` is neither [`ObjectId::IMAGE`] nor given out by this context,
    /// [`Error::Framing`] for kinds the context writes itself, [`Error::Finished`].
    pub fn reserve(&mut self, kind: Kind, id: ObjectId, payload_len: usize) -> Result<Reservation> {
        if kind.is_framing() {
            return Err(Error::Framing { kind });
        }
        self.objects.check_known(id)?;
        self.set_aside(kind, id, payload_len)
    }

    /// As `reserve`, for framing kinds and unknown ids too.
    pub(super) fn set_aside(
        &mut self,
        kind: Kind,
        id: ObjectId,
        payload_len: usize,
    ) -> Result<Reservation> {
        self.check_open()?;
        if self.has_its_only(kind, id) {
            return Err(Error::Duplicate { kind, id });
        }
        if payload_len as u64 > MAX_PAYLOAD {
            return Err(Error::TooLong {
                kind,
                len: payload_len,
            });
        }
        let place = self.chain.take(FrameHeader::LEN + padded(payload_len))?;
        self.open += 1;
        Ok(Reservation {
            context: self.serial,
            place,
            kind,
            id,
            payload_len,
        })
    }

    /// The payload of a reservation, to be filled in; zero at first.
    ///
    /// # Panics
    ///
    /// If the reservation is another context's.
    pub fn payload(&mut self, reservation: &Reservation) -> &mut [u8] {
        assert_eq!(
            reservation.context, self.serial,
            "a reservation of another context"
        );
        &mut self.chain.bytes_mut(reservation.place)[FrameHeader::LEN..][..reservation.payload_len]
    }

    /// Ends a reservation: from here on the record is part of the image and does not change.
    ///
    /// # Errors
    ///
    /// [`Error::Duplicate`] if a record of the same kind and object was committed meanwhile, [`Error::Sink`] if the
    /// context streams and the sink fails (the context is then broken), [`Error::Foreign`], [`Error::Finished`].
    pub fn commit(&mut self, reservation: Reservation) -> Result<RecordRef> {
        if reservation.context != self.serial {
            return Err(Error::Foreign);
        }
        self.check_open()?;
        let Reservation {
            place,
            kind,
            id,
            payload_len,
            ..
        } = reservation;
        if self.has_its_only(kind, id) {
            self.take_back(place);
            return Err(Error::Duplicate { kind, id });
        }
        let mut header = FrameHeader {
            kind: kind.number(),
            version: kind.version(),
            checksum: 0,
            length: payload_len as u64,
            object: id.raw(),
            sequence: self.stats.records,
        };
        let frame = self.chain.bytes_mut(place);
        let (head, body) = frame.split_at_mut(FrameHeader::LEN);
        header.checksum = header.expected_checksum(body);
        head.copy_from_slice(header.as_bytes());
        let frame_len = frame.len() as u64;

        let kept = match &mut self.mode {
            Mode::Buffering => {
                self.open -= 1;
                self.index.keep(Entry {
                    place,
                    payload_len,
                    kind,
                    version: header.version,
                    id,
                })
            }
            Mode::Streaming(sink) => {
                let written = sink.get_mut().write_all(self.chain.bytes(place));
                self.take_back(place);
                if let Err(error) = written {
                    self.state = State::Broken;
                    return Err(Error::Sink(error));
                }
                self.index.note(kind, id);
                u32::MAX
            }
        };
        self.objects.mark_written(id);
        self.digest.add(header.checksum);
        self.stats.add(kind, payload_len as u64, frame_len);
        Ok(RecordRef {
            context: self.serial,
            index: kept,
        })
    }

    /// Takes a reservation back: nothing of it reaches the image.
    ///
    /// # Panics
    ///
    /// If the reservation is another context's.
    pub fn cancel(&mut self, reservation: Reservation) {
        assert_eq!(
            reservation.context, self.serial,
            "a reservation of another context"
        );
        if self.state == State::Open {
            self.take_back(reservation.place);
        }
    }

    /// Whether an object has a record of a kind of which it may have one.
    fn has_its_only(&self, kind: Kind, id: ObjectId) -> bool {
        !kind.is_repeated() && self.index.holds(kind, id)
    }

    fn take_back(&mut self, place: Place) {
        self.open -= 1;
        self.chain.give_back(place);
    }

    /// The id of a shared object. [`Interned::New`] obliges the caller to commit a record of it.
    pub fn intern(&mut self, key: ObjectKey) -> Interned {
        self.objects.intern(key)
    }

    /// The id of an object interned before.
    #[must_use]
    pub fn interned(&self, key: ObjectKey) -> Option<ObjectId> {
        self.objects.lookup(key)
    }

    /// An id for an object that has one holder only, so that it needs no key. A record of it is owed all the same.
    pub fn new_object(&mut self) -> ObjectId {
        self.objects.fresh()
    }

    /// Makes `id`, which another context has given out, an id of this one. A record of it is owed.
    ///
    /// # Panics
    ///
    /// If it is far beyond those that any context gives out: the table of objects would not fit into memory.
    pub fn adopt(&mut self, id: ObjectId) {
        assert!(id.raw() < 1 << 32, "an id that no context gives out");
        self.objects.adopt(id);
    }

    /// The number that stands for `id` in the payload of one of its users.
    ///
    /// # Errors
    ///
    /// [`Error::Unwritten`] if no record of the object is committed, [`Error::UnknownObject`].
    pub fn refer(&self, id: ObjectId) -> Result<u64> {
        self.objects.check_written(id)?;
        Ok(id.raw())
    }

    /// As [`Context::refer`] for objects that refer to each other, where one has to come first: the record of `id`
    /// may come later, and [`Context::finish`] fails if it doesn't.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownObject`].
    pub fn refer_ahead(&self, id: ObjectId) -> Result<u64> {
        self.objects.check_known(id)?;
        Ok(id.raw())
    }

    /// A committed record.
    ///
    /// # Errors
    ///
    /// [`Error::NotKept`] if the context streams, [`Error::Foreign`].
    pub fn record(&self, reference: RecordRef) -> Result<Record<'_>> {
        if reference.context != self.serial {
            return Err(Error::Foreign);
        }
        if reference.index >= self.index.len() {
            return Err(Error::NotKept);
        }
        Ok(self.view(reference.index))
    }

    /// The kept records in commit order, those of the framing included. A streaming context keeps none.
    pub fn records(&self) -> impl ExactSizeIterator<Item = Record<'_>> {
        (0..self.index.len()).map(|index| self.view(index))
    }

    /// The kept records of a kind in commit order.
    pub fn records_of(&self, kind: Kind) -> impl ExactSizeIterator<Item = Record<'_>> {
        self.index
            .of_kind(kind)
            .iter()
            .map(|&number| self.view(number))
    }

    /// The record of a kind that belongs to an object. A streaming context keeps none.
    #[must_use]
    pub fn find(&self, kind: Kind, id: ObjectId) -> Option<Record<'_>> {
        self.index.find(kind, id).map(|number| self.view(number))
    }

    fn view(&self, number: u32) -> Record<'_> {
        self.index.view(&self.chain, number)
    }

    /// Where and when the image was made. A streaming context does not keep that either.
    #[must_use]
    pub fn image_header(&self) -> Option<ImageHeader> {
        let record = self.find(Kind::ImageHeader, ObjectId::IMAGE)?;
        ImageHeader::read_from_bytes(record.payload()).ok()
    }

    /// Why the checkpoint failed, if an error record says so.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        let record = self.find(Kind::Error, ObjectId::IMAGE)?;
        Some(String::from_utf8_lossy(record.payload()).into_owned())
    }

    /// Counts and bytes by kind.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Bytes of address space that the chain takes. The memory in use is less, pages are allocated as they are filled.
    #[must_use]
    pub fn mapped_bytes(&self) -> usize {
        self.chain.mapped()
    }

    /// Ends the image with its trailer. Nothing can be added after it.
    ///
    /// # Errors
    ///
    /// [`Error::Open`] if reservations are open, [`Error::Unwritten`] if an object was interned and no record of it
    /// committed, [`Error::Sink`], [`Error::Finished`].
    pub fn finish(&mut self) -> Result<()> {
        self.check_open()?;
        if self.open != 0 {
            return Err(Error::Open { count: self.open });
        }
        self.objects.check_complete()?;
        self.end(Trailer::COMPLETE)
    }

    /// Ends the image with an error record that says why the checkpoint failed. Open reservations are void.
    ///
    /// # Errors
    ///
    /// [`Error::Chunk`], [`Error::Sink`], [`Error::Finished`].
    pub fn fail(&mut self, reason: &str) -> Result<()> {
        self.write(Kind::Error, ObjectId::IMAGE, &[reason.as_bytes()])?;
        self.end(Trailer::FAILED)
    }

    fn end(&mut self, status: u32) -> Result<()> {
        let Stats { records, bytes, .. } = self.stats;
        let trailer = Trailer {
            records,
            bytes,
            digest: self.digest.value(),
            status,
        };
        self.write(Kind::Trailer, ObjectId::IMAGE, &[trailer.as_bytes()])?;
        self.state = State::Finished;
        if let Mode::Streaming(sink) = &mut self.mode {
            sink.get_mut().flush().map_err(Error::Sink)?;
        }
        Ok(())
    }

    /// Writes the whole image, in commit order, and flushes. In streaming mode it is written already: does nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Unfinished`] before [`Context::finish`] or [`Context::fail`], [`Error::Sink`], [`Error::Broken`].
    pub fn write_out(&self, sink: &mut dyn Write) -> Result<()> {
        match self.state {
            State::Open => return Err(Error::Unfinished),
            State::Broken => return Err(Error::Broken),
            State::Finished => {}
        }
        if matches!(self.mode, Mode::Streaming(_)) {
            return Ok(());
        }
        sink.write_all(Prologue::CURRENT.as_bytes())
            .map_err(Error::Sink)?;
        for place in self.index.places() {
            sink.write_all(self.chain.bytes(place))
                .map_err(Error::Sink)?;
        }
        sink.flush().map_err(Error::Sink)
    }

    fn check_open(&self) -> Result<()> {
        match self.state {
            State::Open => Ok(()),
            State::Finished => Err(Error::Finished),
            State::Broken => Err(Error::Broken),
        }
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("streaming", &matches!(self.mode, Mode::Streaming(_)))
            .field("state", &self.state)
            .field("records", &self.stats.records)
            .field("bytes", &self.stats.bytes)
            .field("open", &self.open)
            .finish_non_exhaustive()
    }
}
