//! A program with all that it starts: bounded in memory and file size, in a process group of its
//! own, and never outliving whoever runs it.

use std::io;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::{Child, Command};

/// How long a program may tidy up between SIGTERM and SIGKILL. A cancelled job must have stopped
/// within two seconds.
pub(super) const TIDY_UP: Duration = Duration::from_secs(1);

/// Sets the limits and becomes the program. The words come as arguments, so that the shell never
/// reads them. No core dumps: they would hold the job's secrets. A limit that cannot be set is good
/// enough where a lower one holds already.
const BOUNDED: &str = r#"
limit() { ulimit "$1" "$2" 2>/dev/null || [ "$(ulimit "$1")" != unlimited ] || exit 78; }
limit -c 0
[ "$1" = 0 ] || limit -v "$1"
limit -f "$2"
shift 2
exec nice -n 10 "$@"
"#;

/// Waits until the pipe it reads is closed, which the kernel does even when the one who holds its
/// other end is killed, and then ends the group.
const WATCHMAN: &str = r#"read -r _; kill -s KILL -- "-$0""#;

/// The variables that a program sees; the others may hold the server's secrets.
fn is_passed_on(name: &str) -> bool {
    ["PATH", "HOME", "LANG", "TZ"].contains(&name)
        || name.starts_with("LC_")
        || name.starts_with("ENGINE_")
}

/// What one process of a program may use.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Address space in bytes; 0 is no limit.
    pub memory_bytes: u64,
    /// The largest file that it may write, in bytes.
    pub file_bytes: u64,
}

/// A running program. Dropped, it is killed with all that it started.
pub struct Group {
    pub leader: Child,
    /// None once the group is known to be gone.
    id: Option<Pid>,
    /// Declared last and killed first by [`Group::forget`]: its pipe closes only after it is dead.
    watchman: Option<Child>,
}

impl Group {
    /// Starts `words` in `directory`, with all three standard streams piped.
    pub fn start(words: &[String], directory: &Path, bounds: Bounds) -> io::Result<Self> {
        let environment = std::env::vars_os()
            .filter(|(name, _)| name.to_str().is_some_and(is_passed_on))
            .chain([("TMPDIR".into(), directory.as_os_str().to_owned())]);
        let leader = Command::new("/bin/sh")
            .args(["-c", BOUNDED, "engine"])
            .arg((bounds.memory_bytes / 1024).to_string())
            // POSIX counts files in blocks of 512 bytes.
            .arg(bounds.file_bytes.div_ceil(512).to_string())
            .args(words)
            .current_dir(directory)
            .env_clear()
            .envs(environment)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let id = leader.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        let mut group = Self { leader, id, watchman: None };
        group.watchman = group.id.map(watchman).transpose()?;
        Ok(group)
    }

    /// Waits for the program, and then ends what it left running.
    pub async fn finish(&mut self) -> io::Result<ExitStatus> {
        let status = self.leader.wait().await;
        self.kill();
        self.forget();
        status
    }

    /// Asks the program to end, and ends it.
    pub async fn stop(&mut self) {
        self.signal(Signal::TERM);
        let _ = tokio::time::timeout(TIDY_UP, self.leader.wait()).await;
        self.kill();
        let _ = self.leader.wait().await;
        self.forget();
    }

    fn kill(&self) {
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        // The id is not used again as long as a member is left, and ids go round slowly. A group
        // without members is what is wanted.
        if let Some(id) = self.id {
            let _ = kill_process_group(id, signal);
        }
    }

    /// From now on the id may become somebody else's.
    fn forget(&mut self) {
        self.id = None;
        if let Some(mut watchman) = self.watchman.take() {
            let _ = watchman.start_kill();
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
        self.forget();
    }
}

fn watchman(group: Pid) -> io::Result<Child> {
    Command::new("/bin/sh")
        .args(["-c", WATCHMAN])
        .arg(group.as_raw_nonzero().to_string())
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // A Ctrl-C at the terminal is for us: a watchman that it ended could not watch.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}
