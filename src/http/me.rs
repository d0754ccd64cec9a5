//! The caller's own picture of itself.

use actix_web::{HttpResponse, web};
use serde_json::{Value, json};

use super::answer;
use super::app::App;
use super::caller::Caller;
use super::problem::{Code, Problem};
use crate::domain::user::{Onboarding, OnboardingStatus};

/// `GET me`
pub async fn me(app: web::Data<App>, caller: Caller) -> Result<HttpResponse, Problem> {
    let views = &app.system.views;
    let user = views.user(&caller.user_id)?.ok_or_else(|| Problem::new(Code::NotFound))?;
    let usage = views.usage(&caller.user_id)?;
    let session = match &caller.session_id {
        Some(id) => views.session(id)?,
        None => None,
    };
    Ok(answer::ok(json!({
        "user": {
            "id": user.user_id,
            "email": user.email,
            "first_name": user.first_name,
            "last_name": user.last_name,
            "username": user.username,
            "image_url": user.image_url,
            "created_at": user.created_at,
        },
        "session": session,
        "role": caller.role,
        "permissions": caller.permissions,
        "subscription_tier": caller.subscription_tier,
        "user_type": user.user_type,
        "organizations": user.organizations,
        "feature_flags": user.feature_flags,
        "onboarding": onboarding(user.onboarding.as_ref()),
        "usage": usage,
    })))
}

fn onboarding(progress: Option<&Onboarding>) -> Value {
    let needed = progress.is_none_or(|progress| progress.status != OnboardingStatus::Completed);
    json!({
        "status": progress.map(|progress| progress.status),
        "step": progress.map_or(0, |progress| progress.step),
        "total_steps": progress.map(|progress| progress.total_steps),
        "needs_onboarding": needed,
        "redirect_path": needed.then_some("/onboarding"),
    })
}
