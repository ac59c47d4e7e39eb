//! `PAGEMAP_SCAN` on `/proc/PID/pagemap` (Linux 6.7): which pages are there, which were written.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;

use nix::errno::Errno;

/// What is known of a run of pages: `PAGE_IS_*` bits.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Categories(pub u64);

impl Categories {
    /// The VMA is registered for asynchronous write-protection.
    pub const WP_ALLOWED: Self = Self(1 << 0);
    /// Not write-protected: written since it was armed, or never armed.
    pub const WRITTEN: Self = Self(1 << 1);
    /// Page cache, not anonymous memory.
    pub const FILE: Self = Self(1 << 2);
    /// In memory.
    pub const PRESENT: Self = Self(1 << 3);
    /// Swapped out, under migration, or a userfaultfd marker.
    pub const SWAPPED: Self = Self(1 << 4);

    /// A guard (`MADV_GUARD_INSTALL` of madvise(2), Linux 6.13; told since 6.15). It is [`Categories::SWAPPED`] too.
    pub const GUARD: Self = Self(1 << 8);

    /// In memory or swapped out, and not a guard.
    pub fn is_populated(self) -> bool {
        !self.has(Self::GUARD) && (self.has(Self::PRESENT) || self.has(Self::SWAPPED))
    }

    /// Whether all bits of `other` are set.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for Categories {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What all scans tell of a page; whether it is page cache is not among it, for that would cost a look at each page.
const RETURNED: Categories = Categories(
    Categories::WP_ALLOWED.0
        | Categories::WRITTEN.0
        | Categories::PRESENT.0
        | Categories::SWAPPED.0
        | Categories::GUARD.0,
);

/// What this kernel can tell: one that does not know of a category refuses to be asked for it.
fn known() -> Categories {
    static KNOWN: OnceLock<Categories> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let all = Categories(u64::MAX);
        let here = &raw const KNOWN as u64 & !4095;
        let asked = std::fs::File::open("/proc/self/pagemap").is_ok_and(|pagemap| {
            scan_with(
                pagemap,
                Scan::Suspect,
                all,
                here,
                here + 4096,
                &mut Vec::new(),
            )
            .is_ok()
        });
        match asked {
            true => all,
            false => Categories(!Categories::GUARD.0),
        }
    })
}

impl std::fmt::Debug for Categories {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = [
            (Self::WP_ALLOWED, "wp-allowed"),
            (Self::WRITTEN, "written"),
            (Self::FILE, "file"),
            (Self::PRESENT, "present"),
            (Self::SWAPPED, "swapped"),
            (Self::GUARD, "guard"),
        ];
        f.debug_set()
            .entries(
                names
                    .iter()
                    .filter(|(bit, _)| self.has(*bit))
                    .map(|(_, name)| name),
            )
            .finish()
    }
}

/// The page frames in a range, one for each page: 0 for one that is not in memory, and for all if the kernel does not tell,
/// which takes `CAP_SYS_ADMIN` (`Documentation/admin-guide/mm/pagemap.rst`).
pub fn frames(pagemap: &std::fs::File, start: u64, end: u64) -> std::io::Result<Vec<u64>> {
    const ENTRY: usize = size_of::<u64>();
    const PAGE: u64 = 4096;
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let mut bytes = vec![0; ((end - start) / PAGE) as usize * ENTRY];
    std::os::unix::fs::FileExt::read_exact_at(pagemap, &mut bytes, start / PAGE * ENTRY as u64)?;
    let entries = bytes
        .chunks_exact(ENTRY)
        .filter_map(|bytes| bytes.first_chunk());
    Ok(entries
        .map(|bytes| u64::from_ne_bytes(*bytes))
        .map(|entry| {
            if entry & PRESENT == 0 {
                0
            } else {
                entry & FRAME
            }
        })
        .collect())
}

/// A run of pages with the same categories; addresses in bytes, `end` exclusive.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// What holds for every page of it.
    pub categories: Categories,
}

#[repr(C)]
#[derive(Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const _: () = assert!(size_of::<ScanArguments>() == 96 && size_of::<Region>() == 24);

const PAGEMAP_SCAN: libc::c_ulong =
    nix::request_code_readwrite!(b'f', 16, size_of::<ScanArguments>());
const PM_SCAN_WP_MATCHING: u64 = 1;

/// What a scan looks for and does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scan {
    /// Anonymous pages that are in memory or swapped out.
    Populated(Backing),
    /// Pages that are neither in memory nor swapped out, and guards.
    Holes,
    /// Guards.
    Guards,
    /// All but the pages that are in memory, still armed, in a VMA that is registered. So it reports holes too, and is
    /// several times faster than [`Scan::Populated`] where most pages are like that, since the kernel passes over those
    /// without noting each. It does not tell page cache from anonymous pages: see [`Scan::Populated`] for these.
    Suspect,
    /// Write-protects the pages in memory that are not armed, page cache too, and reports those. Skips VMAs that are not registered.
    Rearm,
}

/// What may be behind the pages of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// No file: each page is anonymous, and the page tables tell all there is to know.
    Nothing,
    /// A file: telling page cache from anonymous pages costs a look at the kernel's `struct page` of each, 0.2 us.
    File,
}

/// Which pages a scan reports: those that have, after the bits of `inverted` are flipped, all of `all` and one of `any`
/// (unless that is empty).
#[derive(Debug, Clone, Copy)]
struct Filter {
    inverted: Categories,
    all: Categories,
    any: Categories,
}

impl Scan {
    fn filter(self) -> Filter {
        let everything = Filter {
            inverted: Categories::default(),
            all: Categories::default(),
            any: Categories::default(),
        };
        let there = Filter {
            any: Categories::PRESENT | Categories::SWAPPED,
            ..everything
        };
        match self {
            Self::Populated(Backing::Nothing) => there,
            Self::Populated(Backing::File) => Filter {
                inverted: Categories::FILE,
                all: Categories::FILE,
                ..there
            },
            Self::Holes => Filter {
                inverted: Categories::PRESENT | Categories::SWAPPED,
                all: Categories::PRESENT,
                any: Categories::SWAPPED | Categories::GUARD,
            },
            Self::Guards => Filter {
                all: Categories::GUARD,
                ..everything
            },
            Self::Suspect => Filter {
                inverted: Categories::PRESENT | Categories::WP_ALLOWED,
                any: Categories::PRESENT | Categories::WP_ALLOWED | Categories::WRITTEN,
                ..everything
            },
            Self::Rearm => Filter {
                all: Categories::PRESENT | Categories::WRITTEN,
                ..everything
            },
        }
    }

    fn arms(self) -> bool {
        self == Self::Rearm
    }
}

/// Scans `[start, end)` and appends what it finds to `found`, in address order. Holes are never armed, for that would
/// allocate page tables for them.
pub fn scan(
    pagemap: impl AsFd,
    what: Scan,
    start: u64,
    end: u64,
    found: &mut Vec<Region>,
) -> Result<(), Errno> {
    let known = known();
    if what == Scan::Guards && !known.has(Categories::GUARD) {
        return Ok(());
    }
    scan_with(pagemap, what, known, start, end, found)
}

/// The same without asking for categories that are not `known`.
fn scan_with(
    pagemap: impl AsFd,
    what: Scan,
    known: Categories,
    start: u64,
    end: u64,
    found: &mut Vec<Region>,
) -> Result<(), Errno> {
    const ROOM: usize = 1024;
    let filter = what.filter();
    let mut arguments = ScanArguments {
        size: size_of::<ScanArguments>() as u64,
        flags: if what.arms() { PM_SCAN_WP_MATCHING } else { 0 },
        start,
        end,
        vec_len: ROOM as u64,
        category_inverted: filter.inverted.0,
        category_mask: filter.all.0,
        category_anyof_mask: filter.any.0 & known.0,
        return_mask: RETURNED.0 & known.0,
        ..ScanArguments::default()
    };
    while arguments.start < end {
        let held = found.len();
        found.resize(held + ROOM, Region::default());
        arguments.vec = found[held..].as_mut_ptr() as u64;
        // SAFETY: `arguments` is the kernel's struct pm_scan_arg (size asserted above) and `vec` points to ROOM
        // regions that outlive the call.
        let got = unsafe {
            libc::ioctl(
                pagemap.as_fd().as_raw_fd(),
                PAGEMAP_SCAN,
                &raw mut arguments,
            )
        };
        found.truncate(held + usize::try_from(got).unwrap_or(0));
        // Not `walk_end`: of a scan that has come to its end it may tell where the kernel had its own buffer full.
        let is_full = Errno::result(got)? as usize == ROOM;
        arguments.start = match found.last() {
            Some(last) if is_full => last.end,
            _ => end,
        };
        if held > 0 && found.len() > held {
            let (last, first) = (found[held - 1], found[held]);
            if last.end == first.start && last.categories == first.categories {
                found[held].start = last.start;
                found.remove(held - 1);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use proptest::prelude::*;

    use super::*;

    /// What the kernel does with a filter (`pagemap_scan_is_interesting_page` in `fs/proc/task_mmu.c`).
    fn reports(filter: Filter, page: Categories) -> bool {
        let flipped = page.0 ^ filter.inverted.0;
        flipped & filter.all.0 == filter.all.0 && (filter.any.0 == 0 || flipped & filter.any.0 != 0)
    }

    proptest! {
        #[test]
        fn only_what_is_armed_and_there_is_not_suspect(bits in 0u64..32) {
            let page = Categories(bits);
            let clean = page.has(Categories::PRESENT | Categories::WP_ALLOWED)
                && !page.has(Categories::WRITTEN);
            prop_assert_eq!(reports(Scan::Suspect.filter(), page), !clean);
        }

        #[test]
        fn a_hole_is_never_armed(bits in 0u64..32) {
            let page = Categories(bits & !(Categories::PRESENT | Categories::SWAPPED).0);
            prop_assert!(!reports(Scan::Rearm.filter(), page));
        }

        #[test]
        fn a_page_is_populated_or_a_hole(bits in 0u64..64) {
            // A guard is never in memory, and looks swapped out.
            let is_guard = bits & 32 != 0;
            let page = match is_guard {
                true => Categories(bits & 7) | Categories::SWAPPED | Categories::GUARD,
                false => Categories(bits),
            };
            prop_assert_eq!(reports(Scan::Holes.filter(), page), !page.is_populated());
            prop_assert_eq!(reports(Scan::Guards.filter(), page), is_guard);
        }
    }

    #[test]
    fn holes_are_suspect_and_populated_pages_are_found() {
        const PAGES: usize = 4096;
        let mut map = memmap2::MmapMut::map_anon(PAGES * 4096).unwrap();
        for page in (0..PAGES).step_by(2) {
            map[page * 4096] = 1;
        }
        let (start, end) = (map.as_ptr() as u64, map.as_ptr() as u64 + map.len() as u64);
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let bytes = |what| {
            let mut found = Vec::new();
            scan(&pagemap, what, start, end, &mut found).unwrap();
            for pair in found.windows(2) {
                assert!(pair[0].end <= pair[1].start, "{pair:?} of {what:?}");
            }
            found
                .iter()
                .map(|region| region.end - region.start)
                .sum::<u64>()
        };
        // Not fewer: the kernel may have used huge pages.
        assert!(bytes(Scan::Populated(Backing::Nothing)) >= (PAGES as u64 / 2) * 4096);
        assert_eq!(bytes(Scan::Suspect), PAGES as u64 * 4096);
    }
}
