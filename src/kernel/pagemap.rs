//! `PAGEMAP_SCAN` on `/proc/PID/pagemap` (Linux 6.7): which pages are there, which were written.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

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

/// What scans tell of a page; whether it is page cache is not among it, for that would cost a look at each page.
const RETURNED: Categories = Categories(
    Categories::WP_ALLOWED.0
        | Categories::WRITTEN.0
        | Categories::PRESENT.0
        | Categories::SWAPPED.0,
);

impl std::fmt::Debug for Categories {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = [
            (Self::WP_ALLOWED, "wp-allowed"),
            (Self::WRITTEN, "written"),
            (Self::FILE, "file"),
            (Self::PRESENT, "present"),
            (Self::SWAPPED, "swapped"),
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
    /// All anonymous pages that are in memory or swapped out.
    Populated,
    /// The same, and write-protects each page reported. Skips VMAs that are not registered.
    Arm,
}

/// What may be behind the pages of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// No file: each page is anonymous, and the page tables tell all there is to know.
    Nothing,
    /// A file: telling page cache from anonymous pages costs a look at the kernel's `struct page` of each, 0.2 us.
    File,
}

/// Scans `[start, end)` for anonymous pages and appends what it finds to `found`, in address order. Holes and page
/// cache are not reported, and never armed: arming a hole would allocate page tables for it.
pub fn scan(
    pagemap: impl AsFd,
    what: Scan,
    backing: Backing,
    start: u64,
    end: u64,
    found: &mut Vec<Region>,
) -> Result<(), Errno> {
    const ROOM: usize = 1024;
    let not = match backing {
        Backing::Nothing => Categories::default(),
        Backing::File => Categories::FILE,
    };
    let mut room = [Region::default(); ROOM];
    let mut arguments = ScanArguments {
        size: size_of::<ScanArguments>() as u64,
        flags: if what == Scan::Arm {
            PM_SCAN_WP_MATCHING
        } else {
            0
        },
        start,
        end,
        vec: room.as_mut_ptr() as u64,
        vec_len: ROOM as u64,
        category_inverted: not.0,
        category_mask: not.0,
        category_anyof_mask: (Categories::PRESENT | Categories::SWAPPED).0,
        return_mask: RETURNED.0,
        ..ScanArguments::default()
    };
    while arguments.start < end {
        // SAFETY: `arguments` is the kernel's struct pm_scan_arg (size asserted above) and `vec` points to ROOM
        // regions that outlive the call.
        let got = unsafe {
            libc::ioctl(
                pagemap.as_fd().as_raw_fd(),
                PAGEMAP_SCAN,
                &raw mut arguments,
            )
        };
        let got = Errno::result(got)? as usize;
        for region in &room[..got] {
            match found.last_mut() {
                Some(last) if last.end == region.start && last.categories == region.categories => {
                    last.end = region.end;
                }
                _ => found.push(*region),
            }
        }
        if arguments.walk_end <= arguments.start {
            break;
        }
        arguments.start = arguments.walk_end;
    }
    Ok(())
}
