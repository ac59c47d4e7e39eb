//! The buffer chain: fixed-size chunks of mapped memory files, in which records are laid out and never moved.

use std::ffi::CStr;

use memmap2::MmapMut;

use super::{Error, Result};
use crate::kernel::memory_file::{Appended, map_memory_file};

/// Size of a chunk. A longer record gets a chunk of its own, rounded up to pages.
pub const CHUNK_LEN: usize = 1 << 20;

pub(super) const PAGE: usize = 4096;

/// Name of the chain's memory files in `/proc/PID/maps`.
pub(super) const FILE_NAME: &CStr = c"snapback-chain";

/// A stretch of a chunk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) chunk: u32,
    pub(super) start: u32,
    pub(super) len: usize,
}

#[derive(Debug)]
enum Memory {
    /// Being filled by this chain.
    Own(MmapMut),
    /// Filled from an image.
    Read(Appended),
}

impl Memory {
    fn len(&self) -> usize {
        match self {
            Memory::Own(map) => map.len(),
            Memory::Read(appended) => appended.capacity(),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Memory::Own(map) => map,
            Memory::Read(appended) => appended.bytes(),
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Memory::Own(map) => map,
            Memory::Read(_) => unreachable!("nothing is given out in an image that was read"),
        }
    }
}

#[derive(Debug)]
struct Chunk {
    memory: Memory,
    /// Everything below is given out.
    used: usize,
    /// Everything from here on was never written to, so it is zero.
    touched: usize,
    /// Stretches given out and not taken back.
    live: usize,
}

/// Chunks, owned; dropping the chain frees them all.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// A slot is empty when its chunk, made for one long record, was freed.
    chunks: Vec<Option<Chunk>>,
    /// The chunk that is being filled.
    current: usize,
}

impl Chain {
    /// A chain that was filled from an image.
    pub(super) fn read(chunks: Vec<Appended>) -> Chain {
        let full = |chunk: Appended| {
            let len = chunk.capacity();
            Some(Chunk {
                memory: Memory::Read(chunk),
                used: len,
                touched: len,
                live: 1,
            })
        };
        Chain {
            chunks: chunks.into_iter().map(full).collect(),
            current: 0,
        }
    }

    /// Gives out `len` zero bytes, aligned to 8 if every length is a multiple of 8.
    pub(super) fn take(&mut self, len: usize) -> Result<Place> {
        let index = if len > CHUNK_LEN {
            self.add(len.next_multiple_of(PAGE))?
        } else {
            self.with_room(len)?
        };
        let Some(chunk) = &mut self.chunks[index] else {
            unreachable!("a chunk with room exists")
        };
        let start = chunk.used;
        chunk.used += len;
        chunk.live += 1;
        let dirty = chunk.touched.min(chunk.used);
        if start < dirty {
            chunk.memory.bytes_mut()[start..dirty].fill(0);
        }
        chunk.touched = chunk.touched.max(chunk.used);
        // `start` is below CHUNK_LEN: only the first stretch of a long chunk is given out. A chain of 2^32 chunks
        // does not fit into an address space.
        Ok(Place {
            chunk: index as u32,
            start: start as u32,
            len,
        })
    }

    /// Takes a stretch back; its bytes may be given out again.
    pub(super) fn give_back(&mut self, place: Place) {
        let slot = &mut self.chunks[place.chunk as usize];
        let Some(chunk) = slot else { return };
        chunk.live -= 1;
        if chunk.live == 0 {
            chunk.used = 0;
            if chunk.memory.len() > CHUNK_LEN {
                *slot = None;
            }
        } else if place.start as usize + place.len == chunk.used {
            chunk.used = place.start as usize;
        }
    }

    pub(super) fn bytes(&self, place: Place) -> &[u8] {
        let Some(chunk) = &self.chunks[place.chunk as usize] else {
            return &[];
        };
        &chunk.memory.bytes()[place.start as usize..][..place.len]
    }

    pub(super) fn bytes_mut(&mut self, place: Place) -> &mut [u8] {
        let Some(chunk) = &mut self.chunks[place.chunk as usize] else {
            return &mut [];
        };
        &mut chunk.memory.bytes_mut()[place.start as usize..][..place.len]
    }

    /// Bytes of address space in use. Of memory it is less: pages are allocated when touched.
    pub(super) fn mapped(&self) -> usize {
        self.chunks
            .iter()
            .flatten()
            .map(|chunk| chunk.memory.len())
            .sum()
    }

    /// The index of a normal chunk with `len` bytes free.
    fn with_room(&mut self, len: usize) -> Result<usize> {
        let has_room = |chunk: &Option<Chunk>| {
            chunk
                .as_ref()
                .is_some_and(|c| c.memory.len() == CHUNK_LEN && CHUNK_LEN - c.used >= len)
        };
        if self.chunks.get(self.current).is_some_and(has_room) {
            return Ok(self.current);
        }
        let empty =
            |chunk: &Option<Chunk>| has_room(chunk) && chunk.as_ref().is_some_and(|c| c.live == 0);
        self.current = match self.chunks.iter().position(empty) {
            Some(index) => index,
            None => self.add(CHUNK_LEN)?,
        };
        Ok(self.current)
    }

    fn add(&mut self, len: usize) -> Result<usize> {
        let map = map_memory_file(FILE_NAME, len).map_err(|source| Error::Chunk { len, source })?;
        let chunk = Some(Chunk {
            memory: Memory::Own(map),
            used: 0,
            touched: 0,
            live: 0,
        });
        match self.chunks.iter().position(Option::is_none) {
            Some(index) => {
                self.chunks[index] = chunk;
                Ok(index)
            }
            None => {
                self.chunks.push(chunk);
                Ok(self.chunks.len() - 1)
            }
        }
    }
}
