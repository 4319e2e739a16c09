//! Where a database lies, and whether it is still there after the next deploy: a container's own file system is thrown away.

use std::path::{Path, PathBuf};

use crate::config::identity;

/// Railway's name for where the volume is mounted.
const VOLUME_VARIABLE: &str = "RAILWAY_VOLUME_MOUNT_PATH";

/// Why a database would be lost with its container, in a sentence; `None` when nothing speaks for that. `mounts` is the content of
/// `/proc/self/mountinfo`, `volume` what [`VOLUME_VARIABLE`] holds. What counts is where the paths lead: past links and `..`.
#[must_use]
pub fn loss(database: &Path, mounts: &str, volume: Option<&Path>, is_on_railway: bool) -> Option<String> {
    let place = identity(database);
    let shown = match place == database {
        true => database.display().to_string(),
        false => format!("{}, which is {},", database.display(), place.display()),
    };
    match volume {
        Some(volume) if !place.starts_with(identity(volume)) => {
            return Some(format!(
                "{shown} is not on the volume, which is mounted at {}: it is lost at the next deploy. Move it to {}",
                volume.display(),
                volume.join(database.file_name().unwrap_or_default()).display()
            ));
        }
        None if is_on_railway => {
            return Some(format!(
                "this service has no volume, so {shown} is lost at the next deploy: add a volume, and put the database on it"
            ));
        }
        _ => {}
    }
    let (point, kind) = mount_of(&place, mounts)?;
    (kind == "overlay").then(|| {
        format!(
            "{shown} lies on the container's own file system ({}), which goes with the container: mount a volume, and put the \
             database on it",
            point.display()
        )
    })
}

/// The same, by what this process sees: its mounts and its environment.
#[must_use]
pub fn loss_here(database: &Path) -> Option<String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let volume = std::env::var_os(VOLUME_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
    let is_on_railway = std::env::var_os("RAILWAY_ENVIRONMENT_ID").is_some();
    loss(database, &mounts, volume.as_deref(), is_on_railway)
}

/// The mount that a path is on, and its file system's type (proc(5), `/proc/pid/mountinfo`).
fn mount_of(path: &Path, mounts: &str) -> Option<(PathBuf, String)> {
    let parse = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let point = before.split(' ').nth(4)?.replace("\\040", " ");
        Some((PathBuf::from(point), after.split(' ').next()?.to_owned()))
    };
    // Of several mounts at one place, the last one covers the others.
    mounts.lines().filter_map(parse).filter(|(point, _)| path.starts_with(point)).fold(None, |best, found| match best {
        Some((point, kind)) if found.0.components().count() < Path::components(&point).count() => Some((point, kind)),
        _ => Some(found),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTAINER: &str = "\
570 420 0:55 / / rw,relatime master:200 - overlay overlay rw,lowerdir=/a,upperdir=/b
571 570 0:58 / /proc rw,nosuid - proc proc rw
580 570 8:1 /volumes/x /data rw,relatime - ext4 /dev/sda1 rw
581 570 8:1 /v /my\\040data rw - xfs /dev/sdb rw";

    fn lost(path: &str, volume: Option<&str>, is_on_railway: bool) -> Option<String> {
        loss(Path::new(path), CONTAINER, volume.map(Path::new), is_on_railway)
    }

    #[test]
    fn what_goes_with_the_container_is_known() {
        assert!(lost("/app/prisma/dev.db", None, false).unwrap().contains("container's own file system"));
        assert_eq!(lost("/data/app.db", None, false), None);
        assert_eq!(lost("/my data/app.db", None, false), None);
        assert!(lost("/database/app.db", None, false).is_some(), "/data is no parent of it");
        assert_eq!(loss(Path::new("/srv/app.db"), "20 1 8:1 / / rw - ext4 /dev/sda1 rw", None, false), None);
    }

    #[test]
    fn railway_says_where_its_volume_is() {
        assert!(lost("/app/dev.db", Some("/data"), true).unwrap().contains("Move it to /data/dev.db"));
        assert_eq!(lost("/data/app.db", Some("/data"), true), None);
        assert!(lost("/data/app.db", None, true).unwrap().contains("no volume"));
    }

    /// A directory with a volume and, beside it, the application's own.
    fn scene() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let [volume, application] = ["data", "app"].map(|name| directory.path().join(name));
        for made in [&volume, &application] {
            std::fs::create_dir(made).unwrap();
        }
        (directory, volume, application)
    }

    fn why(database: &Path, volume: &Path) -> Option<String> {
        loss(database, "", Some(volume), true)
    }

    #[test]
    fn a_path_with_dots_is_where_it_leads() {
        let (_directory, volume, application) = scene();
        for is_there in [false, true] {
            if is_there {
                std::fs::write(volume.join("app.db"), "").unwrap();
                std::fs::write(application.join("app.db"), "").unwrap();
            }
            assert_eq!(why(&application.join("../data/app.db"), &volume), None);
            assert!(why(&volume.join("../app/app.db"), &volume).unwrap().contains("is not on the volume"));
        }
    }

    #[test]
    fn a_link_into_the_volume_is_on_it() {
        let (directory, volume, application) = scene();
        std::os::unix::fs::symlink(&volume, application.join("storage")).unwrap();
        assert_eq!(why(&application.join("storage/app.db"), &volume), None);
        std::fs::write(volume.join("app.db"), "").unwrap();
        std::os::unix::fs::symlink(volume.join("app.db"), application.join("link.db")).unwrap();
        assert_eq!(why(&application.join("link.db"), &volume), None);
        // The variable may name a link itself.
        std::os::unix::fs::symlink(&volume, directory.path().join("mount")).unwrap();
        assert_eq!(why(&volume.join("app.db"), &directory.path().join("mount")), None);
    }

    #[test]
    fn a_link_that_leads_out_of_the_volume_is_not_on_it() {
        let (_directory, volume, application) = scene();
        std::os::unix::fs::symlink(&application, volume.join("storage")).unwrap();
        let told = why(&volume.join("storage/app.db"), &volume).unwrap();
        let leads = std::fs::canonicalize(&application).unwrap().join("app.db");
        assert!(told.contains(&format!("which is {}, is not on the volume", leads.display())), "{told}");
    }
}
