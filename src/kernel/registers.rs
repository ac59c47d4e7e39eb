//! The general registers as plain words, for records.
#![allow(unsafe_code)]

use super::ptrace::Registers;

/// Number of words in [`Registers`].
pub const WORDS: usize = size_of::<Registers>() / size_of::<u64>();

/// The registers in the order of `user_regs_struct` (`sys/user.h`): `r15` first, `gs` last.
pub fn to_words(registers: &Registers) -> [u64; WORDS] {
    // SAFETY: both types are the same number of 64-bit integers without padding, and any value of them is valid.
    unsafe { std::mem::transmute_copy(registers) }
}

/// The registers that [`to_words`] took apart.
pub fn from_words(words: &[u64; WORDS]) -> Registers {
    // SAFETY: as in `to_words`.
    unsafe { std::mem::transmute_copy(words) }
}

const _: () = assert!(WORDS * size_of::<u64>() == size_of::<Registers>() && WORDS == 27);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_lead_back() {
        let mut words = [0; WORDS];
        words
            .iter_mut()
            .enumerate()
            .for_each(|(at, word)| *word = at as u64);
        let registers = from_words(&words);
        assert_eq!(
            (registers.r15, registers.rip, registers.gs),
            (words[0], words[16], words[26])
        );
        assert_eq!(to_words(&registers), words);
    }
}
