//! What an image tells of an address space besides its pages.

use std::path::Path;

use zerocopy::FromBytes;

use super::layout::Program;
use super::{Error, Result};
use crate::kernel::procfs::Bounds;
use crate::memory::{LenderHeader, Ranges, Span};
use crate::record::{Frames, Kind, ObjectId};

/// An address space in an image.
#[derive(Debug)]
pub struct StoredSpace {
    /// The program, and the files behind the mappings.
    pub program: Program,
    /// The text of the shadow's `/proc/PID/smaps`.
    pub smaps: String,
    /// Where the parts of the program are.
    pub bounds: Bounds,
    /// The auxiliary vector.
    pub auxv: Vec<u8>,
    /// Its guards (`MADV_GUARD_INSTALL`).
    pub guards: Ranges,
    /// The text of its `numa_maps`, if that tells of other memory policies than the default.
    pub policies: Option<String>,
    /// The shadow that has pages of it which are not in the image.
    pub(super) lender: Option<(LenderHeader, Ranges)>,
}

impl StoredSpace {
    pub(super) fn read(frames: &Frames, path: &Path, id: ObjectId) -> Result<Self> {
        let payload = |kind: Kind| {
            let frame = frames.find(kind, id).ok_or_else(|| Error::Inconsistent {
                path: path.to_owned(),
                problem: format!("there is no {kind} of address space {id}"),
            })?;
            frames.payload(frame).map_err(Error::image(path))
        };
        let wrong = |kind: Kind, problem: String| Error::Inconsistent {
            path: path.to_owned(),
            problem: format!("{kind} of address space {id}: {problem}"),
        };
        let program = payload(Kind::Program)?;
        let smaps = payload(Kind::MemoryFlags)?;
        let bounds = payload(Kind::ProgramBounds)?;
        let guards = payload(Kind::Guards)?;
        let spans = spans(&guards)
            .ok_or_else(|| wrong(Kind::Guards, "not a list of spans in order".into()))?;
        let policies = frames.find(Kind::MemoryPolicies, id);
        let policies = policies.map(|frame| frames.payload(frame).map_err(Error::image(path)));
        let policies = policies.transpose()?;
        let lender = match frames.find(Kind::Lender, id) {
            None => None,
            Some(_) => {
                let payload = payload(Kind::Lender)?;
                let lender = LenderHeader::read_from_prefix(&payload).ok();
                let lender = lender.and_then(|(header, rest)| Some((header, self::spans(rest)?)));
                let bad = || wrong(Kind::Lender, "not a process and a list of spans".into());
                Some(lender.ok_or_else(bad)?)
            }
        };
        Ok(Self {
            lender,
            policies: policies.map(|text| String::from_utf8_lossy(&text).into_owned()),
            program: serde_json::from_slice(&program)
                .map_err(|error| wrong(Kind::Program, error.to_string()))?,
            smaps: String::from_utf8(smaps)
                .map_err(|_| wrong(Kind::MemoryFlags, "not UTF-8".into()))?,
            bounds: Bounds::read_from_bytes(&bounds)
                .map_err(|_| wrong(Kind::ProgramBounds, format!("{} bytes", bounds.len())))?,
            auxv: payload(Kind::AuxiliaryVector)?,
            guards: spans,
        })
    }
}

/// Reads a list of spans that are in order, apart and not empty.
fn spans(payload: &[u8]) -> Option<Ranges> {
    let mut ranges = Ranges::new();
    let (mut rest, mut end) = (payload, 0);
    while !rest.is_empty() {
        let (span, after) = Span::read_from_prefix(rest).ok()?;
        if span.start >= span.end || span.start < end {
            return None;
        }
        ranges.push(span);
        (rest, end) = (after, span.end);
    }
    Some(ranges)
}
