//! From the bytes of an image to records in chunks, believing nothing.

use std::collections::HashSet;
use std::io::{self, Read};

use zerocopy::FromBytes;

use super::chain::{CHUNK_LEN, Chain, FILE_NAME, PAGE, Place};
use super::frame::{Digest, FrameHeader, MAX_PAYLOAD, Prologue, Trailer, padded};
use super::index::Entry;
use super::{Context, Error, FORMAT_VERSION, ImageHeader, Kind, MAGIC, ObjectId, Position, Result};
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
    offset: u64,
    sequence: u64,
    digest: Digest,
    seen: HashSet<(Kind, ObjectId)>,
    failed: bool,
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
            offset: 0,
            sequence: 0,
            digest: Digest::default(),
            seen: HashSet::new(),
            failed: false,
            chunks: 0,
            current: None,
        }
    }

    /// The next record, `None` after the trailer and a clean end of the input. Not to be called after an error.
    pub(super) fn next(&mut self) -> Result<Option<Decoded>> {
        if self.stage == Stage::Prologue {
            self.prologue()?;
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

    fn prologue(&mut self) -> Result<()> {
        let mut bytes = [0; Prologue::LEN];
        let got = self.fill(&mut bytes, None)?;
        if got < MAGIC.len() || bytes[..MAGIC.len()] != MAGIC {
            let mut found = [0; 8];
            found.copy_from_slice(&bytes[..8]);
            return Err(Error::NotAnImage { found });
        }
        self.check_whole(got, bytes.len(), None)?;
        let Prologue {
            format_version,
            reserved,
            ..
        } = zerocopy::transmute!(bytes);
        if format_version != FORMAT_VERSION {
            return Err(Error::FutureFormat {
                version: format_version,
                known: FORMAT_VERSION,
            });
        }
        self.offset = Prologue::LEN as u64;
        if reserved != 0 {
            return Err(self.malformed(None, "the reserved field of the prologue is not zero"));
        }
        Ok(())
    }

    fn record(&mut self) -> Result<Decoded> {
        let mut head = [0; FrameHeader::LEN];
        let got = self.fill(&mut head, None)?;
        self.check_whole(got, head.len(), None)?;
        let header: FrameHeader = zerocopy::transmute!(head);
        let kind = Kind::from_number(header.kind);
        if header.length > MAX_PAYLOAD {
            return Err(Error::AbsurdLength {
                at: self.at(kind),
                length: header.length,
            });
        }
        let payload_len = header.length as usize;
        let frame_len = FrameHeader::LEN + padded(payload_len);

        let (mut target, new_chunk) = self.target(frame_len)?;
        let frame = &mut target.1.room()[..frame_len];
        frame[..head.len()].copy_from_slice(&head);
        let body = &mut frame[head.len()..];
        let got = self.fill(body, kind)?;
        self.check_whole(got, body.len(), kind)?;
        let expected = header.expected_checksum(body);
        if header.checksum != expected {
            return Err(Error::Checksum {
                at: self.at(kind),
                expected,
                found: header.checksum,
            });
        }
        let (kind, id) = self.check_header(&header)?;
        let (payload, padding) = body.split_at(payload_len);
        if padding.iter().any(|&byte| byte != 0) {
            return Err(self.malformed(Some(kind), "the padding is not zero"));
        }
        self.check_place(kind, id, payload)?;

        let (chunk, mut appender) = target;
        let start = appender.published() as u32;
        appender.publish(frame_len);
        if frame_len <= CHUNK_LEN {
            self.current = Some((chunk, appender));
        }
        self.digest.add(header.checksum);
        self.sequence += 1;
        self.offset += frame_len as u64;
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

    /// What a header has to say, its checksum being right.
    fn check_header(&self, header: &FrameHeader) -> Result<(Kind, ObjectId)> {
        let kind = Kind::from_number(header.kind);
        let at = self.at(kind);
        if header.sequence != self.sequence {
            return Err(Error::Order {
                at,
                found: header.sequence,
            });
        }
        let Some(kind) = kind else {
            return Err(Error::UnknownKind {
                at,
                number: header.kind,
            });
        };
        if header.version > kind.version() {
            return Err(Error::FutureVersion {
                at,
                version: header.version,
                known: kind.version(),
            });
        }
        if header.version == 0 {
            return Err(Error::Malformed {
                at,
                problem: "version 0 does not exist",
            });
        }
        match ObjectId::from_raw(header.object) {
            Some(id) => Ok((kind, id)),
            None => Err(Error::Malformed {
                at,
                problem: "object id 0 does not exist",
            }),
        }
    }

    /// Whether a record may be here: what comes first, what comes last, what comes once.
    fn check_place(&mut self, kind: Kind, id: ObjectId, payload: &[u8]) -> Result<()> {
        let malformed = |problem| Err(self.malformed(Some(kind), problem));
        if (kind == Kind::ImageHeader) != (self.sequence == 0) {
            return malformed("the image header is the first record, and only that");
        }
        if kind.is_framing() && id != ObjectId::IMAGE {
            return malformed("a record of the image itself belongs to object 1");
        }
        if self.failed && kind != Kind::Trailer {
            return malformed("only the trailer follows an error record");
        }
        if self.seen.contains(&(kind, id)) {
            return malformed("the object has a record of this kind already");
        }
        match kind {
            Kind::ImageHeader => match ImageHeader::read_from_bytes(payload) {
                Err(_) => return malformed("an image header has 120 bytes"),
                Ok(header) if header.flags & !ImageHeader::KNOWN_FLAGS != 0 => {
                    return malformed("the image header has flags that are not known here");
                }
                Ok(_) => {}
            },
            Kind::Trailer => self.check_trailer(payload)?,
            Kind::Error => self.failed = true,
            _ => {}
        }
        self.seen.insert((kind, id));
        Ok(())
    }

    fn check_trailer(&self, payload: &[u8]) -> Result<()> {
        let malformed = |problem| Err(self.malformed(Some(Kind::Trailer), problem));
        let Ok(trailer) = Trailer::read_from_bytes(payload) else {
            return malformed("a trailer has 24 bytes");
        };
        let status = if self.failed {
            Trailer::FAILED
        } else {
            Trailer::COMPLETE
        };
        if trailer.records != self.sequence || trailer.bytes != self.offset {
            return malformed("the trailer counts other records or bytes than there are");
        }
        if trailer.digest != self.digest.value() {
            return malformed("the trailer's checksum is not that of the records before it");
        }
        if trailer.status != status {
            return malformed("the trailer's status does not agree with the error record");
        }
        Ok(())
    }

    fn expect_end(&mut self) -> Result<()> {
        let mut byte = [0];
        match self.fill(&mut byte, None)? {
            0 => Ok(()),
            _ => Err(self.malformed(None, "there is something after the trailer")),
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
                        at: self.at(kind),
                        source,
                    });
                }
            }
        }
        Ok(filled)
    }

    fn check_whole(&self, got: usize, wanted: usize, kind: Option<Kind>) -> Result<()> {
        if got == wanted {
            return Ok(());
        }
        Err(Error::Truncated {
            at: self.at(kind),
            missing: (wanted - got) as u64,
        })
    }

    fn malformed(&self, kind: Option<Kind>, problem: &'static str) -> Error {
        Error::Malformed {
            at: self.at(kind),
            problem,
        }
    }

    fn at(&self, kind: Option<Kind>) -> Position {
        Position {
            record: self.sequence,
            offset: self.offset,
            kind,
        }
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
    header.ok_or_else(|| decoder.malformed(None, "there is no image header"))
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
        let mut decoder = Decoder::new(reader);
        let (mut chunks, mut entries) = (Vec::new(), Vec::new());
        while let Some(Decoded { entry, new_chunk }) = decoder.next()? {
            chunks.extend(new_chunk);
            entries.push(entry);
        }
        Ok(Context::loaded(Chain::read(chunks), entries))
    }
}
