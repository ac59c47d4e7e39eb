//! The bytes around a payload: prologue, frame header, image header, trailer. `docs/image-format.md` is the
//! description for other readers.

use std::time::{SystemTime, UNIX_EPOCH};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Kind;

/// First bytes of an image. The high bit and the line ends show up transfers that mangle text.
pub const MAGIC: [u8; 8] = *b"\x89SNAP\r\n\x1a";

/// The version of the framing itself. What follows the prologue is only defined for a known version.
pub const FORMAT_VERSION: u32 = 1;

/// Records begin at multiples of this, and so do their payloads.
pub const ALIGNMENT: usize = 8;

/// The longest payload that is written, and that a reader believes in.
pub const MAX_PAYLOAD: u64 = 1 << 36;

const _: () = assert!(
    cfg!(target_endian = "little"),
    "the image is little-endian and read in place"
);

/// The first 16 bytes of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct Prologue {
    pub(super) magic: [u8; 8],
    pub(super) format_version: u32,
    pub(super) reserved: u32,
}

impl Prologue {
    pub(super) const LEN: usize = size_of::<Prologue>();
    pub(super) const CURRENT: Prologue = Prologue {
        magic: MAGIC,
        format_version: FORMAT_VERSION,
        reserved: 0,
    };
}

/// What precedes every payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct FrameHeader {
    pub(super) kind: u16,
    pub(super) version: u16,
    /// CRC-32C over this header with the field zero, the payload and its padding.
    pub(super) checksum: u32,
    /// Of the payload, without padding.
    pub(super) length: u64,
    pub(super) object: u64,
    /// Position in the image, from 0.
    pub(super) sequence: u64,
}

impl FrameHeader {
    pub(super) const LEN: usize = size_of::<FrameHeader>();

    /// The checksum this header should carry; `body` is payload and padding.
    pub(super) fn expected_checksum(&self, body: &[u8]) -> u32 {
        let bare = FrameHeader {
            checksum: 0,
            ..*self
        };
        crc32c::crc32c_append(crc32c::crc32c(bare.as_bytes()), body)
    }
}

const _: () = assert!(Prologue::LEN == 16 && FrameHeader::LEN == 32);
const _: () =
    assert!(Prologue::LEN.is_multiple_of(ALIGNMENT) && FrameHeader::LEN.is_multiple_of(ALIGNMENT));

/// Length of payload and padding.
pub(super) const fn padded(payload_len: usize) -> usize {
    payload_len.next_multiple_of(ALIGNMENT)
}

/// Where and when an image was made: the payload of [`Kind::ImageHeader`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct ImageHeader {
    /// Creation time in nanoseconds since 1970-01-01 UTC.
    pub created_ns: u64,
    /// None is defined yet; a reader refuses flags that it doesn't know.
    pub flags: u64,
    /// The machine as ELF numbers it (`EM_*` in `elf.h`): 62 is x86-64.
    pub machine: u32,
    /// Bytes in a page.
    pub page_size: u32,
    /// `uname -r`, padded with zeros, cut if longer.
    pub kernel_release: [u8; 64],
    /// Version of the writer, padded with zeros.
    pub writer: [u8; 32],
}

const _: () = assert!(size_of::<ImageHeader>() == 120);

impl ImageHeader {
    /// Flags that this build understands.
    pub(super) const KNOWN_FLAGS: u64 = 0;

    /// The header of an image made here and now.
    #[must_use]
    pub fn here() -> ImageHeader {
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let release = nix::sys::utsname::uname()
            .map(|names| names.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        let page_size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
            .ok()
            .flatten();
        ImageHeader {
            created_ns: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX),
            flags: 0,
            machine: machine(),
            page_size: page_size
                .and_then(|size| u32::try_from(size).ok())
                .unwrap_or(4096),
            kernel_release: zero_padded(release.as_bytes()),
            writer: zero_padded(env!("CARGO_PKG_VERSION").as_bytes()),
        }
    }

    /// The kernel release as text.
    #[must_use]
    pub fn kernel_release(&self) -> String {
        text(&self.kernel_release)
    }

    /// The version of the writer as text.
    #[must_use]
    pub fn writer(&self) -> String {
        text(&self.writer)
    }
}

fn machine() -> u32 {
    let machine = if cfg!(target_arch = "x86_64") {
        libc::EM_X86_64
    } else {
        libc::EM_NONE
    };
    u32::from(machine)
}

fn zero_padded<const N: usize>(text: &[u8]) -> [u8; N] {
    let mut field = [0; N];
    let len = text.len().min(N);
    field[..len].copy_from_slice(&text[..len]);
    field
}

fn text(field: &[u8]) -> String {
    let end = field
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

/// The payload of [`Kind::Trailer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct Trailer {
    /// Records before the trailer.
    pub(super) records: u64,
    /// Bytes before the trailer, prologue included.
    pub(super) bytes: u64,
    /// [`Digest`] of the records before the trailer.
    pub(super) digest: u32,
    /// [`Trailer::COMPLETE`] or [`Trailer::FAILED`].
    pub(super) status: u32,
}

impl Trailer {
    pub(super) const COMPLETE: u32 = 0;
    pub(super) const FAILED: u32 = 1;
}

/// Checksum of a whole image: CRC-32C over the checksums of its records, in order.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Digest(u32);

impl Digest {
    pub(super) fn add(&mut self, checksum: u32) {
        self.0 = crc32c::crc32c_append(self.0, checksum.as_bytes());
    }

    pub(super) const fn value(self) -> u32 {
        self.0
    }
}

/// Where in an image something is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Number of the record, from 0.
    pub record: u64,
    /// Bytes from the start of the image to the record.
    pub offset: u64,
    /// The record's kind, where that much could be read.
    pub kind: Option<Kind>,
}

impl std::fmt::Display for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "record {}", self.record)?;
        if let Some(kind) = self.kind {
            write!(f, " ({kind})")?;
        }
        write!(f, " at byte {}", self.offset)
    }
}
