//! What an image has to keep to, record by record: the same for whoever reads all of it and for who passes over contents.

use std::collections::HashSet;

use zerocopy::FromBytes;

use super::frame::{Digest, FrameHeader, MAX_PAYLOAD, Prologue, Trailer, padded};
use super::{Error, FORMAT_VERSION, ImageHeader, Kind, MAGIC, ObjectId, Position, Result};

/// How far an image was read, and what the rules need to know of what came before.
#[derive(Debug, Default)]
pub(super) struct Checks {
    offset: u64,
    sequence: u64,
    digest: Digest,
    seen: HashSet<(Kind, ObjectId)>,
    failed: bool,
}

impl Checks {
    /// Bytes before the record that is next.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The first bytes, of which `got` are there.
    pub(super) fn prologue(&mut self, bytes: [u8; Prologue::LEN], got: usize) -> Result<()> {
        if got < MAGIC.len() || bytes[..MAGIC.len()] != MAGIC {
            let mut found = [0; 8];
            found.copy_from_slice(&bytes[..8]);
            return Err(Error::NotAnImage { found });
        }
        self.whole(got, bytes.len(), None)?;
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

    /// The length of a frame by its header, of which nothing else is believed yet.
    pub(super) fn frame_len(&self, header: &FrameHeader) -> Result<usize> {
        if header.length > MAX_PAYLOAD {
            return Err(Error::AbsurdLength {
                at: self.at(Kind::from_number(header.kind)),
                length: header.length,
            });
        }
        Ok(FrameHeader::LEN + padded(header.length as usize))
    }

    /// The checksum of a frame; `body` is payload and padding.
    pub(super) fn checksum(&self, header: &FrameHeader, body: &[u8]) -> Result<()> {
        let expected = header.expected_checksum(body);
        if header.checksum == expected {
            return Ok(());
        }
        Err(Error::Checksum {
            at: self.at(Kind::from_number(header.kind)),
            expected,
            found: header.checksum,
        })
    }

    /// What a header has to say.
    pub(super) fn header(&self, header: &FrameHeader) -> Result<(Kind, ObjectId)> {
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

    /// That the padding is zero.
    pub(super) fn padding(&self, kind: Kind, padding: &[u8]) -> Result<()> {
        match padding.iter().all(|&byte| byte == 0) {
            true => Ok(()),
            false => Err(self.malformed(Some(kind), "the padding is not zero")),
        }
    }

    /// Whether a record may be here: what comes first, what comes last, what comes once. Of kinds that may be repeated the
    /// payload is not looked at.
    pub(super) fn place(&mut self, kind: Kind, id: ObjectId, payload: &[u8]) -> Result<()> {
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
        if kind.is_repeated() {
            return Ok(());
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
            Kind::Trailer => self.trailer(payload)?,
            Kind::Error => self.failed = true,
            _ => {}
        }
        self.seen.insert((kind, id));
        Ok(())
    }

    fn trailer(&self, payload: &[u8]) -> Result<()> {
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

    /// A record has passed.
    pub(super) fn passed(&mut self, header: &FrameHeader, frame_len: usize) {
        self.digest.add(header.checksum);
        self.sequence += 1;
        self.offset += frame_len as u64;
    }

    /// That as much was there as had to be.
    pub(super) fn whole(&self, got: usize, wanted: usize, kind: Option<Kind>) -> Result<()> {
        if got == wanted {
            return Ok(());
        }
        Err(Error::Truncated {
            at: self.at(kind),
            missing: (wanted - got) as u64,
        })
    }

    pub(super) fn malformed(&self, kind: Option<Kind>, problem: &'static str) -> Error {
        Error::Malformed {
            at: self.at(kind),
            problem,
        }
    }

    pub(super) fn at(&self, kind: Option<Kind>) -> Position {
        Position {
            record: self.sequence,
            offset: self.offset,
            kind,
        }
    }
}
