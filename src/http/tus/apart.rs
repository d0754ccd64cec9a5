//! Work apart from the request that asks for it, which is dropped when its client hangs up.

use tokio::sync::oneshot;

use super::super::problem::{Code, Problem};

/// Work that goes on to a safe place when the client hangs up, which drops the request.
pub(super) async fn to_the_end<T: 'static>(
    work: impl Future<Output = Result<T, Problem>> + 'static,
) -> Result<T, Problem> {
    let done = actix_web::rt::spawn(work).await;
    done.unwrap_or_else(|error| Err(Problem::new(Code::InternalError).caused_by(error)))
}

/// The same for what nobody can find without its answer: it is undone if there is nobody to hear it.
pub(super) async fn heard_or_undone<T: 'static, U: Future<Output = ()> + 'static>(
    work: impl Future<Output = Result<T, Problem>> + 'static,
    undo: impl FnOnce(T) -> U + 'static,
) -> Result<T, Problem> {
    let (tell, told) = oneshot::channel();
    actix_web::rt::spawn(async move {
        if let Err(Ok(unheard)) = tell.send(work.await) {
            undo(unheard).await;
        }
    });
    told.await.unwrap_or_else(|error| Err(Problem::new(Code::InternalError).caused_by(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[actix_web::test]
    async fn what_nobody_is_there_to_hear_of_is_undone() {
        let (begin, begun) = oneshot::channel::<()>();
        let (undo, mut undone) = oneshot::channel();
        let mut gone = Box::pin(heard_or_undone(
            async move { begun.await.map(|()| 7).map_err(|_| Problem::new(Code::NotFound)) },
            |number| async move { undo.send(number).unwrap() },
        ));
        assert!(futures_util::poll!(&mut gone).is_pending());
        drop(gone);
        begin.send(()).unwrap();
        assert_eq!((&mut undone).await, Ok(7));

        let (undo, undone) = oneshot::channel();
        let work = async { Ok(7) };
        let heard = heard_or_undone(work, |number| async move { undo.send(number).unwrap() });
        assert!(matches!(heard.await, Ok(7)));
        assert!(undone.await.is_err(), "it was dropped unused");
    }
}
