//! A container as `state` and `list` show it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use nix::unistd::{Uid, User};
use serde::Serialize;

use super::locate::{Located, Status};

/// The state of a container in the OCI runtime specification's terms and runc's additions to them.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct View {
    pub(crate) oci_version: String,
    pub(crate) id: String,
    /// 0 without an init.
    pub(crate) pid: i32,
    pub(crate) status: Status,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: PathBuf,
    /// RFC 3339.
    pub(crate) created: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) annotations: BTreeMap<String, String>,
    /// Name of the user who created it, the number if it has none.
    pub(crate) owner: String,
}

impl From<Located> for View {
    fn from(located: Located) -> View {
        let state = located.state;
        let name = |uid: u32| match User::from_uid(Uid::from_raw(uid)) {
            Ok(Some(user)) => user.name,
            _ => uid.to_string(),
        };
        View {
            oci_version: state.oci_version,
            id: located.id,
            pid: located.init.map_or(0, nix::unistd::Pid::as_raw),
            status: located.status,
            bundle: located.bundle,
            rootfs: located.rootfs.unwrap_or_default(),
            created: state
                .created
                .map(|created| created.to_rfc3339().replace("+00:00", "Z"))
                .unwrap_or_default(),
            annotations: state.annotations.unwrap_or_default().into_iter().collect(),
            owner: state.creator.map(name).unwrap_or_default(),
        }
    }
}
