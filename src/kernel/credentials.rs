//! Whose files a thread of ours makes.

use nix::unistd::{Gid, Uid, getegid, geteuid, setfsgid, setfsuid};

/// Does something with this user and group id for access to files (setfsuid(2)), which are this thread's alone. A file system
/// mounted in a user namespace takes new files from users only that are mapped there (`EOVERFLOW`).
pub fn acting_as<T>((user, group): (u32, u32), work: impl FnOnce() -> T) -> T {
    /// Puts them back, also should the work panic.
    struct Back;
    impl Drop for Back {
        fn drop(&mut self) {
            setfsuid(geteuid());
            setfsgid(getegid());
        }
    }
    let _back = Back;
    setfsgid(Gid::from_raw(group));
    setfsuid(Uid::from_raw(user));
    work()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn files_are_of_that_user_meanwhile() {
        let place = tempfile::tempdir().unwrap();
        let owner_of = |name: &str| {
            let path = place.path().join(name);
            std::fs::write(&path, "").unwrap();
            let at = std::fs::metadata(path).unwrap();
            (at.uid(), at.gid())
        };
        let root = (geteuid().as_raw(), getegid().as_raw());
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(place.path(), open).unwrap();
        assert_eq!(acting_as((1234, 2345), || owner_of("one")), (1234, 2345));
        assert_eq!(owner_of("other"), root);
    }
}
