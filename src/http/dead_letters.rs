//! What administrators see and decide about deliveries that could not be used. Bodies, which hold
//! personal data, are shown on the command line only.

use actix_web::{HttpResponse, web};
use serde::Serialize;
use serde_json::json;

use super::answer;
use super::app::App;
use super::caller::Caller;
use super::edges::RequestId;
use super::lists::{PageAnswer, PageQuery};
use super::problem::{Code, Problem};
use super::webhooks::{Outcome, Verified, acknowledged, use_or_keep};
use crate::actors::dead_letters::{Cursor, Letter};

/// `GET admin/webhooks/dead`
pub async fn list(
    app: web::Data<App>,
    _caller: Caller,
    page: PageQuery<Cursor>,
) -> Result<HttpResponse, Problem> {
    let (items, end) = app.dead_letters.page(page.cursor.as_ref(), page.limit).await?;
    Ok(answer::ok(PageAnswer { items, next_cursor: end.map(|cursor| cursor.text()) }))
}

/// `POST admin/webhooks/dead/{id}/retry`
pub async fn retry(
    app: web::Data<App>,
    _caller: Caller,
    request_id: RequestId,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    let Letter { heading, body } = found(&app, &id).await?;
    let delivery = Verified {
        message_id: &heading.message_id,
        body: body.as_bytes(),
        received_at: heading.received_at,
    };
    match use_or_keep(&app, delivery, request_id).await? {
        Outcome::Unusable(reason) => Err(Problem::new(Code::Conflict)
            .with_sentence("The delivery is still unusable")
            .with_detail(json!({ "reason": reason }))),
        outcome => {
            // Another node may have kept it, unknown to this one.
            app.dead_letters.discard(&heading.message_id).await?;
            Ok(acknowledged(&outcome))
        }
    }
}

/// The answer when a delivery was forgotten.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct LetterDiscarded {
    pub message_id: String,
    pub deleted: bool,
}

/// `DELETE admin/webhooks/dead/{id}`
pub async fn discard(
    app: web::Data<App>,
    _caller: Caller,
    id: web::Path<String>,
) -> Result<HttpResponse, Problem> {
    let Letter { heading, .. } = found(&app, &id).await?;
    app.dead_letters.discard(&heading.message_id).await?;
    Ok(answer::ok(LetterDiscarded { message_id: heading.message_id, deleted: true }))
}

async fn found(app: &App, message_id: &str) -> Result<Letter, Problem> {
    let letter = app.dead_letters.find(message_id).await?;
    letter.ok_or_else(|| Problem::new(Code::NotFound))
}
