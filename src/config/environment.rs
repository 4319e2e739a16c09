//! A configuration from the environment alone, as containers have it: `DATABASE_URL`, and a bucket that is linked to the service.

use std::path::{Path, PathBuf};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::replica_url::ReplicaUrl;
use super::{ConfigError, DatabaseConfig};

/// Names the database as the application does.
pub const DATABASE_VARIABLE: &str = "DATABASE_URL";
/// Names the replica.
pub const REPLICA_VARIABLE: &str = "WALTRAIL_REPLICA";
/// Names the bucket, where a platform links one.
pub const BUCKET_VARIABLE: &str = "AWS_S3_BUCKET_NAME";

/// The database and its replica that the environment names. `variable` looks a variable up, `directory` is where relative
/// paths begin.
///
/// # Errors
/// A sentence that says which variable is missing or can't be understood.
pub fn database(variable: impl Fn(&str) -> Option<String>, directory: &Path) -> Result<DatabaseConfig, ConfigError> {
    let wrong = |what: String| ConfigError::Environment { what };
    let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
    let url = set(DATABASE_VARIABLE).ok_or_else(|| wrong(format!("{DATABASE_VARIABLE} is not set")))?;
    let path = database_path(&url, directory)
        .map_err(|why| wrong(format!("{DATABASE_VARIABLE} is '{}': {why}", shown(&url))))?;
    let replica = match (set(REPLICA_VARIABLE), set(BUCKET_VARIABLE)) {
        (Some(replica), _) => replica,
        // A name may hold what has another meaning in a URL.
        (None, Some(bucket)) => format!("s3://{bucket}/{}", utf8_percent_encode(&name_of(&path), NON_ALPHANUMERIC)),
        (None, None) => {
            return Err(wrong(format!(
                "neither {REPLICA_VARIABLE} nor {BUCKET_VARIABLE} is set: link a bucket to the service, or name the replica"
            )));
        }
    };
    let replica: ReplicaUrl =
        replica.parse().map_err(|error: super::replica_url::ReplicaUrlError| wrong(error.to_string()))?;
    Ok(DatabaseConfig::new(path, replica))
}

/// A URL of another kind of database may hold a password.
fn shown(url: &str) -> &str {
    if url.contains('@') { url.split_once(':').map_or("…", |(scheme, _)| scheme) } else { url }
}

/// The name of the file without its extension.
fn name_of(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// The file that a `DATABASE_URL` names: Prisma's `file:…`, Django's and SQLAlchemy's `sqlite:///…`, Rails' `sqlite3:…`, or a path.
fn database_path(url: &str, directory: &Path) -> Result<PathBuf, String> {
    if url.starts_with(['"', '\'']) {
        return Err("the quotes are part of the value, as `docker --env-file` leaves them; write it without".into());
    }
    if url.starts_with("jdbc:") {
        return Err("that is how Java writes it; write file:/data/app.db".into());
    }
    let (scheme, rest) = match url.split_once(':') {
        Some((scheme, rest)) if !scheme.contains('/') => (scheme, rest),
        _ => ("", url),
    };
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let name = match scheme {
        "file" => rest.strip_prefix("//").unwrap_or(rest),
        // Three slashes and a relative path, or four and an absolute one.
        "sqlite" => rest.strip_prefix("///").or_else(|| rest.strip_prefix("//")).unwrap_or(rest),
        "sqlite3" => rails_path(rest)?,
        "" => rest,
        other => return Err(format!("'{other}' is no SQLite database; write file:/data/app.db")),
    };
    let name = percent_encoding::percent_decode_str(name).decode_utf8().map_err(|error| error.to_string())?;
    match name.as_ref() {
        "" | "/" => Err("it names no file; write file:/data/app.db".into()),
        ":memory:" => Err("a database in memory can't be backed up".into()),
        name if Path::new(name).is_absolute() => Ok(PathBuf::from(name)),
        name => Ok(base_of(scheme, directory).join(name.strip_prefix("./").unwrap_or(name))),
    }
}

/// What follows `sqlite3:`. Rails takes the path of the URL: `/foo` and `///foo` are absolute, `foo.db` is relative.
fn rails_path(rest: &str) -> Result<&str, String> {
    match rest.strip_prefix("//") {
        None => Ok(rest),
        Some(path) if path.starts_with('/') => Ok(path),
        Some(_) => Err("what follows two slashes is a server's name; write sqlite3:///data/app.sqlite3, or \
                        sqlite3:db/app.sqlite3 for a relative path"
            .into()),
    }
}

/// Where a relative path begins: for Prisma the directory of the schema.
fn base_of(scheme: &str, directory: &Path) -> PathBuf {
    let schema = directory.join("prisma");
    if scheme == "file" && schema.join("schema.prisma").exists() { schema } else { directory.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)], directory: &Path) -> Result<DatabaseConfig, String> {
        let find = |name: &str| pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        database(find, directory).map_err(|error| error.to_string())
    }

    #[test]
    fn a_linked_bucket_is_enough() {
        let found =
            of(&[(DATABASE_VARIABLE, "file:/data/app.db"), (BUCKET_VARIABLE, "my-bucket")], Path::new("/srv")).unwrap();
        assert_eq!(
            (found.path.to_str(), found.replica.to_string().as_str()),
            (Some("/data/app.db"), "s3://my-bucket/app")
        );
        let named = [(DATABASE_VARIABLE, "/data/app.db"), (BUCKET_VARIABLE, "b"), (REPLICA_VARIABLE, "s3://other/x")];
        assert_eq!(of(&named, Path::new("/srv")).unwrap().replica.to_string(), "s3://other/x");
    }

    #[test]
    fn any_name_of_a_file_is_a_place_in_a_linked_bucket() {
        for (url, place) in [
            ("file:/data/what%3F.db", "s3://my-bucket/what?"),
            ("file:/data/no%231.db", "s3://my-bucket/no#1"),
            ("file:/data/100%25.db", "s3://my-bucket/100%"),
            ("file:/data/a%252Fb.db", "s3://my-bucket/a%2Fb"),
            ("file:/data/my-app_2.1.db", "s3://my-bucket/my-app_2.1"),
        ] {
            let found = of(&[(DATABASE_VARIABLE, url), (BUCKET_VARIABLE, "my-bucket")], Path::new("/srv")).unwrap();
            assert_eq!(found.replica.to_string(), place, "{url}");
        }
    }

    #[test]
    fn urls_as_frameworks_write_them() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let path = |url: &str| database_path(url, root);
        assert_eq!(path("file:./dev.db").unwrap(), root.join("dev.db"));
        std::fs::create_dir(root.join("prisma")).unwrap();
        std::fs::write(root.join("prisma/schema.prisma"), "").unwrap();
        for (url, expected) in [
            ("file:./dev.db", root.join("prisma/dev.db")),
            ("file:dev.db?connection_limit=1&socket_timeout=10", root.join("prisma/dev.db")),
            ("file:/data/my%20app.db", PathBuf::from("/data/my app.db")),
            ("file:///data/app.db", PathBuf::from("/data/app.db")),
            ("sqlite:////data/app.db", PathBuf::from("/data/app.db")),
            ("sqlite:///db.sqlite3", root.join("db.sqlite3")),
            ("sqlite3:db/production.sqlite3", root.join("db/production.sqlite3")),
            ("sqlite3:/data/app.sqlite3", PathBuf::from("/data/app.sqlite3")),
            ("sqlite3:///data/production.sqlite3", PathBuf::from("/data/production.sqlite3")),
            ("sqlite3:///data/app.sqlite3?pool=5", PathBuf::from("/data/app.sqlite3")),
            ("sqlite3:////data/app.sqlite3", PathBuf::from("/data/app.sqlite3")),
            ("/data/app.db", PathBuf::from("/data/app.db")),
        ] {
            assert_eq!(path(url), Ok(expected), "{url}");
        }
        for (url, says) in [
            ("postgres://me:secret@host/app", "no SQLite database"),
            ("file:", "names no file"),
            ("sqlite3:///", "names no file"),
            ("sqlite3://db/production.sqlite3", "a server's name"),
            ("\"file:/data/app.db\"", "the quotes are part of the value"),
            ("'/data/app.db'", "the quotes are part of the value"),
            ("jdbc:sqlite:/data/app.db", "how Java writes it"),
            ("sqlite::memory:", "in memory"),
        ] {
            let error = of(&[(DATABASE_VARIABLE, url), (BUCKET_VARIABLE, "b")], root).unwrap_err();
            assert!(error.contains(says) && !error.contains("secret"), "{url}: {error}");
        }
        assert!(of(&[], root).unwrap_err().contains("DATABASE_URL is not set"));
        assert!(of(&[(DATABASE_VARIABLE, "/a.db")], root).unwrap_err().contains("link a bucket"));
    }
}
