//! From the bytes of an image to records in chunks, believing nothing.

use std::io::{self, Read};

use zerocopy::FromBytes;

use super::chain::{CHUNK_LEN, Chain, FILE_NAME, PAGE, Place};
use super::check::Checks;
use super::frame::{FrameHeader, Prologue};
use super::index::Entry;
use super::{Context, Error, ImageHeader, Kind, Result};
use crate::kernel::memory_file::{Appended, Appender, appendable_memory_file};

/// One read asks for no more than this.
const READ_STEP: usize = 1 << 20;

/// A record that was read.
#[derive(Debug)]
pub(super) struct Decoded {
    pub(super) entry: Entry,
    /// The chunk that the record lies in, if it is the first one there. Chunks are numbered in this order.
    pub(super) new_chunk: Option<Appended>,
}

/// Reads an image, record by record, into chunks. Every record is checked before it is shown.
#[derive(Debug)]
pub(super) struct Decoder<R> {
    reader: R,
    stage: Stage,
    checks: Checks,
    chunks: u32,
    current: Option<(u32, Appender)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Prologue,
    Records,
    End,
}

impl<R: Read> Decoder<R> {
    pub(super) fn new(reader: R) -> Decoder<R> {
        Decoder {
            reader,
            stage: Stage::Prologue,
            checks: Checks::default(),
            chunks: 0,
            current: None,
        }
    }

    /// The next record, `None` after the trailer and a clean end of the input. Not to be called after an error.
    pub(super) fn next(&mut self) -> Result<Option<Decoded>> {
        if self.stage == Stage::Prologue {
            let mut bytes = [0; Prologue::LEN];
            let got = self.fill(&mut bytes, None)?;
            self.checks.prologue(bytes, got)?;
            self.stage = Stage::Records;
        }
        if self.stage == Stage::End {
            return Ok(None);
        }
        let decoded = self.record()?;
        if decoded.entry.kind == Kind::Trailer {
            self.stage = Stage::End;
            self.expect_end()?;
        }
        Ok(Some(decoded))
    }

    fn record(&mut self) -> Result<Decoded> {
        let mut head = [0; FrameHeader::LEN];
        let got = self.fill(&mut head, None)?;
        self.checks.whole(got, head.len(), None)?;
        let header: FrameHeader = zerocopy::transmute!(head);
        let frame_len = self.checks.frame_len(&header)?;
        let kind = Kind::from_number(header.kind);
        let payload_len = header.length as usize;

        let (mut target, new_chunk) = self.target(frame_len)?;
        let frame = &mut target.1.room()[..frame_len];
        frame[..head.len()].copy_from_slice(&head);
        let body = &mut frame[head.len()..];
        let got = self.fill(body, kind)?;
        self.checks.whole(got, body.len(), kind)?;
        self.checks.checksum(&header, body)?;
        let (kind, id) = self.checks.header(&header)?;
        let (payload, padding) = body.split_at(payload_len);
        self.checks.padding(kind, padding)?;
        self.checks.place(kind, id, payload)?;

        let (chunk, mut appender) = target;
        let start = appender.published() as u32;
        appender.publish(frame_len);
        if frame_len <= CHUNK_LEN {
            self.current = Some((chunk, appender));
        }
        self.checks.passed(&header, frame_len);
        let place = Place {
            chunk,
            start,
            len: frame_len,
        };
        Ok(Decoded {
            entry: Entry {
                place,
                payload_len,
                kind,
                version: header.version,
                id,
            },
            new_chunk,
        })
    }

    /// The chunk for a frame of this length, taken from the decoder.
    fn target(&mut self, frame_len: usize) -> Result<((u32, Appender), Option<Appended>)> {
        if frame_len <= CHUNK_LEN
            && let Some(mut current) = self.current.take()
            && current.1.room().len() >= frame_len
        {
            return Ok((current, None));
        }
        let len = if frame_len <= CHUNK_LEN {
            CHUNK_LEN
        } else {
            frame_len.next_multiple_of(PAGE)
        };
        let (appender, appended) = appendable_memory_file(FILE_NAME, len)
            .map_err(|source| Error::Chunk { len, source })?;
        let number = self.chunks;
        self.chunks += 1;
        Ok(((number, appender), Some(appended)))
    }

    fn expect_end(&mut self) -> Result<()> {
        let mut byte = [0];
        match self.fill(&mut byte, None)? {
            0 => Ok(()),
            _ => Err(self
                .checks
                .malformed(None, "there is something after the trailer")),
        }
    }

    /// Reads until `buffer` is full or the input ends; returns how much came.
    fn fill(&mut self, buffer: &mut [u8], kind: Option<Kind>) -> Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            let step = (buffer.len() - filled).min(READ_STEP);
            match self.reader.read(&mut buffer[filled..filled + step]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(Error::Source {
                        at: self.checks.at(kind),
                        source,
                    });
                }
            }
        }
        Ok(filled)
    }
}

/// Reads no more than the image header: where and when an image was made.
///
/// # Errors
///
/// As [`Context::load`], as far as it reads.
pub fn read_header(reader: impl Read) -> Result<ImageHeader> {
    let mut decoder = Decoder::new(reader);
    let decoded = decoder.next()?;
    let payload = decoded.as_ref().and_then(|decoded| {
        let place = decoded.entry.place;
        let bytes = decoded.new_chunk.as_ref()?.bytes();
        bytes
            .get(place.start as usize + FrameHeader::LEN..)?
            .get(..decoded.entry.payload_len)
    });
    let header = payload.and_then(|payload| ImageHeader::read_from_bytes(payload).ok());
    header.ok_or_else(|| decoder.checks.malformed(None, "there is no image header"))
}

impl Context {
    /// Reads a whole image. The context is finished: it can be looked at and written out again, not added to.
    ///
    /// An image with an error record is a valid image: see [`Context::failure`].
    ///
    /// # Errors
    ///
    /// [`Error::Source`] if `reader` fails, else what is wrong with the image and where: [`Error::NotAnImage`],
    /// [`Error::FutureFormat`], [`Error::Truncated`], [`Error::AbsurdLength`], [`Error::Checksum`], [`Error::Order`],
    /// [`Error::UnknownKind`], [`Error::FutureVersion`], [`Error::Malformed`]. [`Error::Chunk`] if memory runs out.
    pub fn load(reader: impl Read) -> Result<Context> {
        match Context::load_damaged(reader) {
            (context, None) => Ok(context),
            (_, Some(error)) => Err(error),
        }
    }

    /// As [`Context::load`], of an image that may be damaged: the records before the damage, and what that is.
    pub fn load_damaged(reader: impl Read) -> (Context, Option<Error>) {
        let mut decoder = Decoder::new(reader);
        let (mut chunks, mut entries) = (Vec::new(), Vec::new());
        let error = loop {
            match decoder.next() {
                Ok(Some(Decoded { entry, new_chunk })) => {
                    chunks.extend(new_chunk);
                    entries.push(entry);
                }
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        (Context::loaded(Chain::read(chunks), entries), error)
    }
}
