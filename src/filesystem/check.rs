//! Refuses a plan that could not be carried out to its end.

use std::path::{Path, PathBuf};

use super::area::Area;
use super::meta::{APPEND, IMMUTABLE};
use super::mounted::{Mounted, file_error};
use super::plan::Plan;
use super::tree::{Content, NodeId, Tree};
use super::uses::{How, Use};
use super::{Error, Result};
use crate::outcome::Refusal;

/// Refuses what the kernel would refuse half-way: changes of what is immutable, and more content than there is room for.
pub fn check(mounted: &Mounted, wanted: &Tree, live: &Tree, plan: &Plan) -> Result<()> {
    for (node, path) in &plan.touched {
        if live.nodes[*node].meta.stat.attributes & (IMMUTABLE | APPEND) != 0 {
            return Err(Error::Refused(Refusal {
                object: format!("the file {}", mounted.path(path).display()),
                holder: format!("the mount at {}", mounted.mount_point.display()),
                remedy: "it is immutable or append-only and can't be changed back; remove that with chattr -ia".into(),
            }));
        }
    }
    let size = |node: NodeId| match &wanted.nodes[node].content {
        Content::Kept(kept) => kept.bytes(),
        Content::Lower(_) => wanted.nodes[node].meta.stat.size,
        Content::Unknown => 0,
    };
    let made: u64 = plan.made.iter().map(|node| size(*node)).sum();
    let room = rustix::fs::fstatvfs(&mounted.root)
        .map_err(|errno| file_error("statfs of", &mounted.mount_point)(errno.into()))?;
    let room = room.f_bfree * room.f_frsize;
    if made > room {
        return Err(Error::Refused(Refusal {
            object: format!("{made} bytes of files to be made again"),
            holder: format!("the mount at {}", mounted.mount_point.display()),
            remedy: format!("only {room} are free there; remove something"),
        }));
    }
    Ok(())
}

/// Refuses if what is in use has to be made again, unless by descriptors, which can be opened again.
pub fn check_uses(
    mounted: &Mounted,
    area: &Area,
    wanted: &Tree,
    plan: &Plan,
    uses: &[Use],
) -> Result<()> {
    for node in &plan.made {
        let stat = &wanted.nodes[*node].meta.stat;
        let is_it =
            |using: &&Use| using.how != How::Open && using.is_of(area, &wanted.nodes[*node]);
        if stat.file_type() == libc::S_IFSOCK {
            continue;
        }
        if let Some(using) = uses.iter().find(is_it) {
            let path = plan.after.get(node).map_or(Path::new(""), PathBuf::as_path);
            return Err(Error::Refused(Refusal {
                object: format!("{}: {}", using.what, mounted.path(path).display()),
                holder: using.holder.clone(),
                remedy: "the file was deleted since the checkpoint while it was in use and would be another; keep the program from replacing it".into(),
            }));
        }
    }
    Ok(())
}
