//! Deleting many objects with one request, where the server knows that request.

use aws_sdk_s3::types::{Delete, Error as KeyError, ObjectIdentifier};

use super::{S3Store, kind_of};
use crate::store::{DeleteFailure, ObjectStore, StoreError, StoreErrorKind};

const OPERATION: &str = "delete";

impl S3Store {
    /// DeleteObjects. Not every server knows it, and some want a checksum that the SDK does not send any more: one that
    /// refuses the request as such is asked for each key by itself.
    pub(super) async fn delete_objects(&self, keys: &[String]) -> Result<Vec<DeleteFailure>, StoreError> {
        match self.delete_objects_at_once(keys).await {
            Err(error) if matches!(error.kind, StoreErrorKind::NotSupported | StoreErrorKind::Other) => {
                tracing::debug!(%error, "objects are deleted one by one");
                self.delete_one_by_one(keys).await
            }
            answer => answer,
        }
    }

    async fn delete_objects_at_once(&self, keys: &[String]) -> Result<Vec<DeleteFailure>, StoreError> {
        let first = keys.first().map_or("", String::as_str);
        let internal = |error: aws_sdk_s3::error::BuildError| StoreError {
            operation: OPERATION,
            ..self.error(StoreErrorKind::Other, first, error)
        };
        let identifiers = keys.iter().map(|key| ObjectIdentifier::builder().key(self.full(key)).build());
        let identifiers = identifiers.collect::<Result<Vec<_>, _>>().map_err(internal)?;
        // Quiet: the answer names only what failed. What it does not name and is there all the same, a listing tells.
        let delete = Delete::builder().set_objects(Some(identifiers)).quiet(true).build().map_err(internal)?;
        let request = self.client.delete_objects().bucket(&self.bucket).delete(delete);
        let answer = request.send().await.map_err(self.failed(OPERATION, first))?;
        Ok(answer.errors().iter().filter_map(|error| self.refused(error)).collect())
    }

    async fn delete_one_by_one(&self, keys: &[String]) -> Result<Vec<DeleteFailure>, StoreError> {
        let mut failures = Vec::new();
        for key in keys {
            if let Err(error) = self.delete(key).await {
                failures.push((key.clone(), error));
            }
        }
        Ok(failures)
    }

    /// What the answer says of one key. That it is not there is what was asked for.
    fn refused(&self, error: &KeyError) -> Option<DeleteFailure> {
        let code = error.code().unwrap_or_default();
        let key = error.key().unwrap_or_default();
        let key = key.strip_prefix(self.prefix.as_str()).unwrap_or(key);
        let message = match error.message() {
            Some(text) => format!("the store answered {code}: {text}"),
            None => format!("the store answered {code}"),
        };
        let failure = StoreError { operation: OPERATION, ..self.error(kind_of(0, code), key, message) };
        (code != "NoSuchKey").then(|| (key.to_owned(), failure))
    }
}
