//! Room for pages in our own address space, of which single pages can be given back to the kernel.
#![allow(unsafe_code)]

use std::io;

use memmap2::{MmapMut, UncheckedAdvice};

/// Anonymous memory, zero until it is written to. It takes no more than what was written.
#[derive(Debug)]
pub struct Pages(MmapMut);

impl Pages {
    /// Maps `len` bytes.
    ///
    /// # Errors
    ///
    /// Those of mmap(2).
    pub fn map(len: usize) -> io::Result<Self> {
        Ok(Self(MmapMut::map_anon(len)?))
    }

    /// Bytes, whose pages are made when they are first looked at.
    pub fn bytes(&self, at: usize, len: usize) -> &[u8] {
        &self.0[at..at + len]
    }

    /// As [`Pages::bytes`], to be written to.
    pub fn bytes_mut(&mut self, at: usize, len: usize) -> &mut [u8] {
        &mut self.0[at..at + len]
    }

    /// Gives pages back; they are zero then. `at` and `len` are whole pages.
    ///
    /// # Errors
    ///
    /// Those of madvise(2).
    pub fn discard(&mut self, at: usize, len: usize) -> io::Result<()> {
        // SAFETY: the mapping is anonymous and private and nobody else has borrowed it (`&mut self`): that its bytes become
        // zero is no more than a write to them. memmap2 checks the range.
        unsafe {
            self.0
                .unchecked_advise_range(UncheckedAdvice::DontNeed, at, len)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discarded_pages_are_zero() {
        let mut pages = Pages::map(4 * 4096).unwrap();
        pages.bytes_mut(0, 4 * 4096).fill(7);
        pages.discard(4096, 2 * 4096).unwrap();
        assert!(pages.bytes(0, 4096).iter().all(|byte| *byte == 7));
        assert!(pages.bytes(4096, 8192).iter().all(|byte| *byte == 0));
        assert!(pages.bytes(3 * 4096, 4096).iter().all(|byte| *byte == 7));
    }
}
