//! An image of which the contents stay on disk: its records are found and checked, and read when they are asked for.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zerocopy::{FromBytes, IntoBytes};

use super::check::Checks;
use super::frame::{FrameHeader, Position, Prologue};
use super::{Error, ImageHeader, Kind, ObjectId, Result};

/// A record in a file.
#[derive(Debug, Clone, Copy)]
pub struct Frame {
    header: FrameHeader,
    offset: u64,
    kind: Kind,
    id: ObjectId,
}

impl Frame {
    /// What the record describes.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// The object it belongs to.
    #[must_use]
    pub const fn id(&self) -> ObjectId {
        self.id
    }

    /// Its number in the image, from 0.
    #[must_use]
    pub const fn sequence(&self) -> u64 {
        self.header.sequence
    }

    /// Bytes of its payload.
    #[must_use]
    pub const fn payload_len(&self) -> u64 {
        self.header.length
    }

    /// Where it is, for messages.
    #[must_use]
    pub const fn position(&self) -> Position {
        Position {
            record: self.header.sequence,
            offset: self.offset,
            kind: Some(self.kind),
        }
    }
}

/// The records of an image in a file.
///
/// All were checked when it was opened, but for the checksums of those that may be repeated
/// ([`Kind::is_repeated`](super::Kind::is_repeated)): theirs are checked when they are read. Which checksums those have to be
/// is known by the trailer's.
#[derive(Debug)]
pub struct Frames {
    file: File,
    frames: Vec<Frame>,
    by_object: HashMap<(Kind, ObjectId), usize>,
    header: ImageHeader,
}

impl Frames {
    /// Finds the records of an image that is a whole file.
    ///
    /// # Errors
    ///
    /// As [`Context::load`](super::Context::load), but for the checksums of what is not read.
    pub fn open(file: File) -> Result<Frames> {
        let (frames, header, error) = Frames::walk(&file);
        match (error, header) {
            (Some(error), _) => Err(error),
            (None, Some(header)) => Ok(Frames::new(file, frames, header)),
            (None, None) => Err(Checks::default().malformed(None, "there is no image header")),
        }
    }

    /// As [`Frames::open`], of an image that may be damaged: what there is up to the damage, and what that is. `None` if not
    /// even the image header can be read.
    pub fn open_damaged(file: File) -> (Option<Frames>, Option<Error>) {
        let (frames, header, error) = Frames::walk(&file);
        (
            header.map(|header| Frames::new(file, frames, header)),
            error,
        )
    }

    fn new(file: File, frames: Vec<Frame>, header: ImageHeader) -> Frames {
        let single = frames.iter().enumerate();
        let by_object = single
            .filter(|(_, frame)| !frame.kind.is_repeated())
            .map(|(number, frame)| ((frame.kind, frame.id), number))
            .collect();
        Frames {
            file,
            frames,
            by_object,
            header,
        }
    }

    fn walk(file: &File) -> (Vec<Frame>, Option<ImageHeader>, Option<Error>) {
        let mut walk = Walk {
            file,
            length: 0,
            checks: Checks::default(),
            frames: Vec::new(),
            header: None,
        };
        let error = walk.all().err();
        (walk.frames, walk.header, error)
    }

    /// The image header.
    #[must_use]
    pub fn image_header(&self) -> &ImageHeader {
        &self.header
    }

    /// All records, in order.
    #[must_use]
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// The record of a kind that belongs to an object, of kinds that are not repeated.
    #[must_use]
    pub fn find(&self, kind: Kind, id: ObjectId) -> Option<&Frame> {
        self.by_object
            .get(&(kind, id))
            .map(|number| &self.frames[*number])
    }

    /// Reads and checks the payload of a record.
    ///
    /// # Errors
    ///
    /// [`Error::Source`], [`Error::Truncated`], [`Error::Checksum`], [`Error::Malformed`].
    pub fn payload(&self, frame: &Frame) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        self.read_payload(frame, &mut body)?;
        Ok(body)
    }

    /// As [`Frames::payload`], into memory that there is.
    ///
    /// # Errors
    ///
    /// As above; what is in `body` means nothing then.
    pub fn read_payload(&self, frame: &Frame, body: &mut Vec<u8>) -> Result<()> {
        let at = frame.position();
        read(
            &self.file,
            frame.offset + FrameHeader::LEN as u64,
            frame.header.length.next_multiple_of(8) as usize,
            body,
            at,
        )?;
        let expected = frame.header.expected_checksum(body);
        if expected != frame.header.checksum {
            return Err(Error::Checksum {
                at,
                expected,
                found: frame.header.checksum,
            });
        }
        body.truncate(frame.header.length as usize);
        Ok(())
    }
}

/// Reads as many bytes from an offset on.
fn read(file: &File, offset: u64, len: usize, buffer: &mut Vec<u8>, at: Position) -> Result<()> {
    buffer.resize(len, 0);
    file.read_exact_at(buffer, offset)
        .map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => Error::Truncated { at, missing: 1 },
            _ => Error::Source { at, source },
        })
}

/// Goes over the records of a file, in order.
struct Walk<'f> {
    file: &'f File,
    length: u64,
    checks: Checks,
    frames: Vec<Frame>,
    header: Option<ImageHeader>,
}

impl Walk<'_> {
    fn all(&mut self) -> Result<()> {
        let failed = |source| Error::Source {
            at: Checks::default().at(None),
            source,
        };
        self.length = self.file.metadata().map_err(failed)?.len();
        let mut prologue = [0; Prologue::LEN];
        let got = self.available(prologue.len());
        self.file
            .read_exact_at(&mut prologue[..got], 0)
            .map_err(failed)?;
        self.checks.prologue(prologue, got)?;
        let mut body = Vec::new();
        while self.next(&mut body)? != Kind::Trailer {}
        if self.checks.offset() != self.length {
            return Err(self
                .checks
                .malformed(None, "there is something after the trailer"));
        }
        Ok(())
    }

    /// How much of so many bytes is there.
    fn available(&self, wanted: usize) -> usize {
        let left = self.length.saturating_sub(self.checks.offset());
        wanted.min(usize::try_from(left).unwrap_or(usize::MAX))
    }

    fn next(&mut self, body: &mut Vec<u8>) -> Result<Kind> {
        let mut head = FrameHeader::read_from_bytes(&[0; FrameHeader::LEN][..])
            .unwrap_or_else(|_| unreachable!("it has that many bytes"));
        let offset = self.checks.offset();
        let got = self.available(FrameHeader::LEN);
        self.checks.whole(got, FrameHeader::LEN, None)?;
        self.file
            .read_exact_at(head.as_mut_bytes(), offset)
            .map_err(|source| Error::Source {
                at: self.checks.at(None),
                source,
            })?;
        let frame_len = self.checks.frame_len(&head)?;
        let known = Kind::from_number(head.kind);
        self.checks
            .whole(self.available(frame_len), frame_len, known)?;
        // Its header may be wrong too; then it is found out when it is read, or by the count of what there has to be.
        let is_passed_over = known.is_some_and(Kind::is_repeated);
        body.clear();
        if !is_passed_over {
            let from = offset + FrameHeader::LEN as u64;
            let len = frame_len - FrameHeader::LEN;
            read(self.file, from, len, body, self.checks.at(known))?;
            self.checks.checksum(&head, body)?;
        }
        let (kind, id) = self.checks.header(&head)?;
        if !is_passed_over {
            let (payload, padding) = body.split_at(head.length as usize);
            self.checks.padding(kind, padding)?;
            self.checks.place(kind, id, payload)?;
            if kind == Kind::ImageHeader {
                self.header = ImageHeader::read_from_bytes(payload).ok();
            }
        } else {
            self.checks.place(kind, id, &[])?;
        }
        self.checks.passed(&head, frame_len);
        self.frames.push(Frame {
            header: head,
            offset,
            kind,
            id,
        });
        Ok(kind)
    }
}
