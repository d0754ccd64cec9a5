//! Whose the data of a server is. Root may write into everybody's, but what it leaves there is for root
//! alone: a server that runs as the owner could not read it, and would stand still.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::ensure;

use super::layout;

/// Where systemd keeps the state of units with a dynamic user: nobody but root looks into it, save from
/// within such a unit.
const PRIVATE: &str = "/var/lib/private";

/// What a server leaves in its directory, any of which says whose it is. Not the directory itself: in
/// a container root may run the server in one that was lent to it.
const LEFT: [&str; 4] = [layout::LOG, layout::VIEWS, layout::MASTER_KEY, layout::SERVER_LOCK];

/// Called before a command writes in the data directory of a server.
///
/// # Errors
/// Root runs it and what is there is another user's; it names the call that is right.
pub fn refuse_root(data_dir: &Path) -> anyhow::Result<()> {
    let mut left = LEFT.iter().filter_map(|name| std::fs::metadata(data_dir.join(name)).ok());
    let Some(about) = left.next() else { return Ok(()) };
    let real = data_dir.canonicalize().unwrap_or_else(|_| data_dir.to_owned());
    let is_root = rustix::process::geteuid().is_root();
    ensure!(
        !is_root || about.uid() == 0,
        "what is in {} belongs to user {}, whose server could not read what root writes there: call \
         it as `{}`",
        data_dir.display(),
        about.uid(),
        call(&real, about.uid(), about.gid())
    );
    Ok(())
}

fn call(data_dir: &Path, user: u32, group: u32) -> String {
    let private = data_dir.strip_prefix(PRIVATE).ok().and_then(Path::to_str);
    match private.filter(|name| !name.is_empty()) {
        Some(name) => format!(
            "systemd-run --pipe --wait -p DynamicUser=yes -p User={name} -p StateDirectory={name} \
             -p StateDirectoryMode=0700 -p EnvironmentFile=/etc/{name}.env \
             -E T2M_DATA_DIR=/var/lib/{name} t2m …"
        ),
        None => format!("setpriv --reuid={user} --regid={group} --clear-groups t2m …"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_writes_beside_its_own_data_alone() {
        let dir = tempfile::tempdir().unwrap();
        refuse_root(dir.path()).unwrap();
        refuse_root(&dir.path().join("not there yet")).unwrap();
        if !rustix::process::geteuid().is_root() {
            // Only root can give a directory away, and only root is refused.
            return;
        }
        let give =
            |path: &Path| std::os::unix::fs::chown(path, Some(61_234), Some(61_235)).unwrap();
        give(dir.path());
        let key = dir.path().join("master.key");
        std::fs::write(&key, b"").unwrap();
        refuse_root(dir.path()).unwrap();
        give(&key);
        let told = refuse_root(dir.path()).unwrap_err().to_string();
        let call = "`setpriv --reuid=61234 --regid=61235 --clear-groups t2m …`";
        assert!(told.contains("belongs to user 61234") && told.ends_with(call), "{told}");
    }

    #[test]
    fn what_is_a_dynamic_users_is_reached_from_a_unit_with_that_user() {
        let told = call(Path::new("/var/lib/private/t2m"), 61_234, 61_234);
        assert!(told.contains("-p User=t2m -p StateDirectory=t2m "), "{told}");
        assert!(call(Path::new("/var/lib/privately/t2m"), 7, 7).starts_with("setpriv --reuid=7 "));
    }
}
