//! An nginx of the tests: a master, two workers, a port and a directory of its own.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::family::Family;

/// Whether it is installed.
pub(crate) fn is_there() -> bool {
    Path::new("/usr/sbin/nginx").exists()
}

/// A running one, which may not answer yet.
pub(crate) struct Nginx {
    /// Master and workers.
    pub(crate) master: Family,
    /// Where it listens, on 127.0.0.1.
    pub(crate) port: u16,
    _directory: tempfile::TempDir,
}

impl Nginx {
    /// Starts one that serves `page` as `/page`. `http` and `server` are added to its configuration.
    pub(crate) fn start(page: &str, http: &str, server: &str) -> Self {
        let directory = tempfile::Builder::new()
            .permissions(PermissionsExt::from_mode(0o755))
            .tempdir()
            .expect("making a directory");
        // A port that is free now.
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .expect("a free port")
            .port();
        std::fs::write(directory.path().join("page"), page).expect("writing a page");
        let root = directory.path().display();
        let configuration = format!(
            "daemon off; master_process on; worker_processes 2; pid {root}/pid; error_log {root}/error.log;
            events {{ worker_connections 64; }}
            http {{
                access_log {root}/access.log; root {root};
                client_body_temp_path {root}/body; proxy_temp_path {root}/proxy; fastcgi_temp_path {root}/fastcgi;
                uwsgi_temp_path {root}/uwsgi; scgi_temp_path {root}/scgi;
                {http}
                server {{ listen 127.0.0.1:{port}; {server} }}
            }}"
        );
        let path = directory.path().join("nginx.conf");
        std::fs::write(&path, configuration).expect("writing the configuration");
        let mut command = Command::new("nginx");
        command.arg("-c").arg(&path).arg("-p").arg(directory.path());
        let null = Stdio::null;
        Self {
            master: Family::start(command.stdin(null()).stdout(null()).stderr(null())),
            port,
            _directory: directory,
        }
    }
}
