"""A prefix and a new head on a frozen vision transformer of timm."""

import timm
import torch

import prefixattn


def main():
    torch.manual_seed(0)
    # random and small, so that this runs offline; or timm.create_model("vit_base_patch16_224", pretrained=True)
    size = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, **size)
    prefix = prefixattn.attach(model, prefixattn.PrefixConfig(length=10, dropout=0.1))
    model.head.requires_grad_(True)  # attach freezes the whole model
    groups = [{"params": prefix}, {"params": model.head.parameters(), "weight_decay": 0.0}]
    optimizer = prefixattn.FactoredSGD(groups, lr=0.05, momentum=0.9)
    average = timm.utils.ModelEmaV3(prefix, decay=0.9)  # of the prefix: an average of the model does not see it

    images, labels = torch.randn(16, 3, 64, 64), torch.arange(16) % 10
    for step in range(5):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(prefix)
        print("step", step, "loss", round(float(loss), 4))

    average.module.activate()  # the average attends now
    with torch.no_grad():
        print("logits with the average:", list(model(images).shape))
    with prefix.disabled():
        print("plain features:", list(model.forward_features(images).shape))


if __name__ == "__main__":
    main()
