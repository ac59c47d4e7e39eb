//! Rings of AIO contexts (io_setup(2)): memory that the kernel writes to and that can't be made again. They are left as they
//! are, with the kernel's own count of events, so they must be empty at a checkpoint, and are emptied at a rollback.

use nix::unistd::Pid;

use super::Result;
use super::layout::Layout;
use super::space::{refuse, system};
use crate::kernel::remote_memory::{self, Range};

/// Where the ring (`struct aio_ring` of fs/aio.c) has the place of its oldest event; behind it is that of the next one.
const HEAD: u64 = 8;

/// Where the heads of all rings are.
fn heads(layout: &Layout) -> impl Iterator<Item = u64> {
    let is_ring = |name: &[u8]| name.starts_with(b"/[aio]");
    let rings = layout.vmas.iter().filter(move |vma| is_ring(&vma.name));
    rings.map(|vma| vma.start + HEAD)
}

/// Whether there are any.
pub(super) fn any(layout: &Layout) -> bool {
    heads(layout).next().is_some()
}

/// Head and tail.
fn read(pid: Pid, start: u64) -> Result<[u8; 8]> {
    let mut places = [0; 8];
    let len = places.len();
    remote_memory::read(pid, &[Range { start, len }], &mut places)
        .map_err(|errno| system(pid, "reading an AIO ring", errno))?;
    Ok(places)
}

/// Refuses events that nobody has fetched.
pub(super) fn check(pid: Pid, layout: &Layout) -> Result<()> {
    for head in heads(layout) {
        let places = read(pid, head)?;
        if places[..4] != places[4..] {
            let remedy =
                "they could not be put back; take the checkpoint when the program has fetched them";
            return Err(refuse(pid, "AIO context with events that wait", remedy));
        }
    }
    Ok(())
}

/// Drops events that came since.
pub(super) fn empty(pid: Pid, layout: &Layout) -> Result<()> {
    for start in heads(layout) {
        let places = read(pid, start)?;
        if places[..4] != places[4..] {
            let range = Range { start, len: 4 };
            remote_memory::write(pid, &[range], &places[4..])
                .map_err(|errno| system(pid, "emptying an AIO ring", errno))?;
        }
    }
    Ok(())
}
