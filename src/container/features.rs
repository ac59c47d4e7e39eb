//! What this runtime offers, as the OCI runtime specification's features structure.

use std::fs;

use serde_json::{Value, json};

/// The features, for `features`.
pub(crate) fn features() -> Value {
    let actions = fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    // The kernel's names to the specification's.
    let actions: Vec<_> = actions
        .split_whitespace()
        .filter_map(|action| {
            Some(match action {
                "kill_process" => "SCMP_ACT_KILL_PROCESS",
                "kill_thread" => "SCMP_ACT_KILL_THREAD",
                "trap" => "SCMP_ACT_TRAP",
                "errno" => "SCMP_ACT_ERRNO",
                "user_notif" => "SCMP_ACT_NOTIFY",
                "trace" => "SCMP_ACT_TRACE",
                "log" => "SCMP_ACT_LOG",
                "allow" => "SCMP_ACT_ALLOW",
                _ => return None,
            })
        })
        .collect();
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "mand", "noatime", "nodev",
            "nodiratime", "noexec", "nomand", "norelatime", "nostrictatime", "nosuid", "private", "rbind", "relatime",
            "remount", "ro", "rprivate", "rshared", "rslave", "runbindable", "rw", "shared", "slave", "strictatime",
            "suid", "sync", "unbindable"
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "cgroup": { "v1": true, "v2": true, "systemd": false, "systemdUser": false },
            "seccomp": { "enabled": true, "actions": actions },
            "apparmor": { "enabled": true },
            "selinux": { "enabled": false },
        },
        "annotations": { "snapback.version": env!("CARGO_PKG_VERSION") },
    })
}
